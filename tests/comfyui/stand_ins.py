"""In place of packages that ComfyUI's Python lacks and a pack imports, for what is never called here: face detection, mostly."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from unittest.mock import MagicMock


class _Finder:
    """Finds every module of these packages; each is a mock."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


def stand_in(*names):
    """For those of the packages that aren't there."""
    if missing := [name for name in names if find_spec(name) is None]:
        sys.meta_path.append(_Finder(missing))


def server_instance():
    """A pack's routes are added to a server that ComfyUI has by then."""
    import server

    if not hasattr(server.PromptServer, "instance"):
        server.PromptServer.instance = MagicMock()
