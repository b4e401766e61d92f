"""Checkpoint files as clients and ranks alike know them, without reading a weight."""
