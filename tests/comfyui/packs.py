"""Packs of other people's nodes, from where users have them and under the names that ComfyUI gives them: their folders' paths."""

import importlib
import importlib.util
import os
import sys


def part_of_pack(folder, part):
    """A module of the pack in that folder; the pack itself is loaded once."""
    name = os.path.abspath(folder).replace(".", "_x_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{part}")
