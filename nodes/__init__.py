"""The ComfyUI side: the only folder that imports comfy."""
