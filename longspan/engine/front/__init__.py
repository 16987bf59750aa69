"""The caller's side of an engine: `LLM`, `AsyncEngine`, who waits for what."""
