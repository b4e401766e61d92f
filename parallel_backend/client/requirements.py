"""What has to be installed, in which versions, and who stands in the way: packs that share a Python pin what suits them."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ..errors import StartError

# A clone has no metadata and a wheel no requirements.txt, so they stand here too; a test keeps the three equal.
RANKS_NEED = (
    "torch>=2.6",
    "diffusers>=0.36,<0.43",
    "safetensors>=0.4.5",
    "msgspec>=0.19",
    "pyzmq>=26",
    "torchsde>=0.2.6",
    "scipy>=1.11",
    "numpy>=1.26",
    "packaging>=22",
)
COMMANDS_NEED = ("pillow>=10", "tqdm>=4.66")
# Of files alone, by whoever opens one: backends start without it.
FILES_NEED = ("gguf>=0.17",)
# Of ComfyUI, and of its editor where that is installed; pyproject.toml says the same to its registry.
COMFYUI_NEEDED = "ComfyUI>=0.8.0"
EDITOR_NEEDED = "comfyui-frontend-package>=1.30"
# Not where a link leads: a clone may be linked into ComfyUI's folder.
PACK = Path(__file__).absolute().parents[2]
NODE_PACKS = "custom_nodes"


@dataclass(frozen=True)
class Shortfall:
    """A requirement that isn't met: the version `found`, if any, and who asks for that one."""

    requirement: str
    found: str | None
    pinned_by: Sequence[str] = ()

    @property
    def what(self) -> str:
        pins = f" (pinned by {', '.join(self.pinned_by)})" if self.pinned_by else ""
        return f"needs {self.requirement}, found {self.found or 'none'}{pins}"

    @property
    def remedy(self) -> str:
        return pip_install(self.requirement)


def pip_install(requirement: str) -> str:
    """The command that installs it for this Python."""
    return f"{sys.executable} -m pip install {shlex.quote(requirement)}"


def check_installed() -> None:
    """Raises StartError where what ranks need is not there, or another version of it is; in ComfyUI's process, where that is too old."""
    core = core_here()
    if core is not None and not admits(Requirement(COMFYUI_NEEDED), core):
        raise StartError(
            f"parallel-mmdit {Shortfall(COMFYUI_NEEDED, core).what}.", "Update ComfyUI, and start it anew."
        )
    for requirement in RANKS_NEED:
        if short := shortfall(requirement):
            packs = " It takes the place of what others ask for: see that they bear it." if short.pinned_by else ""
            raise StartError(f"parallel-mmdit {short.what}.", f"Run: {short.remedy}{packs}")


def core_here() -> str | None:
    """The version of the ComfyUI that this process is; None in any other."""
    return getattr(sys.modules.get("comfyui_version"), "__version__", None)


def shortfall(requirement: str) -> Shortfall | None:
    """What is wrong with the installed version; None where it is right, or is written so that it can't be compared."""
    wanted = Requirement(requirement)
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Shortfall(requirement, None)
    with suppress(InvalidVersion, TypeError):  # a folder that pip has left behind has no version
        if not admits(wanted, found):
            return Shortfall(requirement, found, sorted(set(_pins(wanted, found))))
    return None


def admits(wanted: Requirement, version: str) -> bool:
    """Vendors' builds before a release, such as 2.6.0a0+nv24.12, count as that release."""
    return wanted.specifier.contains(Version(version).base_version)


def _pins(wanted: Requirement, found: str) -> Iterator[str]:
    """Those who ask for the version found, and for none that we take."""
    for name, line in asked():
        with suppress(InvalidRequirement, InvalidVersion):
            other = Requirement(line)
            if canonicalize_name(other.name) != canonicalize_name(wanted.name) or not admits(other, found):
                continue
            if applies(other) and not agree(wanted, other):
                yield f"{name}: {other.name}{other.specifier}"


def applies(requirement: Requirement) -> bool:
    """Here, and without extras."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def agree(one: Requirement, other: Requirement) -> bool:
    """Whether some version suits both; of ranges, one of their ends does if any, or what comes right after it."""
    ends = [specifier.version.removesuffix(".*") for specifier in (*one.specifier, *other.specifier)]
    tried = [*ends, *(f"{end}.1" for end in ends)]
    return not tried or any(admits(one, version) and admits(other, version) for version in tried)


def asked() -> Iterator[tuple[str, str]]:
    """What every distribution here asks for, and every other pack of ComfyUI's folder: who, and the line."""
    for distribution in importlib.metadata.distributions():
        for line in distribution.requires or ():
            yield f"{distribution.metadata['Name']} {distribution.version}", line
    for path in sorted(PACK.parent.glob("*/requirements.txt")) if PACK.parent.name == NODE_PACKS else ():
        if path.parent == PACK:
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from ((f"{NODE_PACKS}/{path.parent.name}", line.partition("#")[0].strip()) for line in lines)
