"""The version, which both ends of the wire compare. pyproject.toml has it too, since ComfyUI runs a clone that nobody installed."""

__version__ = "0.1.0"
