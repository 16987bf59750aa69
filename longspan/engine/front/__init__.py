"""The caller's side of an engine: `LLM`, `AsyncEngine`, and streams of events."""
