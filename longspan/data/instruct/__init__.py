"""Long instructions by a model (Qwen2.5-1M, section 4): a query from a segment, an answer over the
whole document, filters."""
