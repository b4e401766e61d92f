"""Node packs where users have them: their folders' names are none that Python imports."""

import importlib
import importlib.util
import os
import sys


def pack(name, folder):
    """The pack in that folder, as the package `name`; once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
