"""Figures that a user can print about an installation: `parallel-mmdit bench`."""
