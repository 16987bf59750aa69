"""Answers out of many files, by the command that people type."""
