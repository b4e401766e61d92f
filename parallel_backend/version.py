"""The one place that holds the version; pyproject reads it, and both ends of the wire compare it."""

__version__ = "0.1.0"
