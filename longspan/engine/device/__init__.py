"""What computes a step: the runner, its batches, graphs, sampling and memory."""
