"""Models and how their checkpoints are read."""
