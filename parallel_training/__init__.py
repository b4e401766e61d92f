"""Trains the demo's small checkpoints. Nothing of the sampling path imports this."""
