"""Long-context tasks with exact lengths, resumable runs and intervals. Knows no engine."""
