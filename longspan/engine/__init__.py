"""The engine: requests in, scheduled steps, tokens out. Empty so that the scheduler's side of it
imports without torch; the public names are in `longspan`."""
