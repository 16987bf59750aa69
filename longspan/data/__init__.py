"""Long-context training data: documents to token shards, planted facts and long-range tasks."""
