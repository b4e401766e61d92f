"""Imported last by what forks processes: what it has imported stays shared, since no collection of theirs writes to it."""

import gc
import os
from pathlib import Path

# That it found this by: not for what the processes start, such as a ComfyUI.
_PATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.environ["PYTHONPATH"] = os.pathsep.join(folder for folder in _PATH if folder != str(Path(__file__).parent))

gc.collect()
gc.freeze()
