"""Makers of small checkpoints with random weights in the true layouts: for tests, benchmarks and training."""
