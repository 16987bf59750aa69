"""Progressive pre-training of a Qwen2-architecture model over growing context lengths."""
