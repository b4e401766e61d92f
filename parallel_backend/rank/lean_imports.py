"""Imported by a rank before all else: keeps two packages out that diffusers imports wherever it finds them.

Ranks use neither, they take seconds to import, and in many ComfyUI environments one of them doesn't fit the installed
torch, which would keep the backend from starting.
"""

import sys

for _unused in ("transformers", "torchvision"):
    sys.modules.setdefault(_unused, None)  # type: ignore[arg-type]
