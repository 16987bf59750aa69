"""The HTTP edge: an OpenAI-compatible server in front of an engine in other processes."""
