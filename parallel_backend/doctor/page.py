"""The page: all findings in the order in which a person needs them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from .backends import backends
from .comfyui import comfyui
from .finding import Finding, Verdict
from .installed import clashing, versions
from .links import links
from .machine import devices, folders, network

ORDER = get_args(Verdict)
# In the order in which what is wrong is put right: what comes later may be right once the earlier is.
_PARTS: Sequence[Callable[[], Iterator[Finding]]] = (comfyui, versions, clashing, devices, folders, network)
_INDENT = "       "


def examine() -> list[Finding]:
    """First what is wrong, in the order in which it is to be put right, then notes, then what is as it should be."""
    found = [finding for part in _PARTS for finding in part()]
    if any(finding.verdict == "wrong" for finding in found):
        found.append(Finding("note", "links between ranks were not tried", "Run doctor again once all else is right."))
    else:
        found += links()
    found += backends()
    return sorted(found, key=lambda finding: ORDER.index(finding.verdict))


def as_text(findings: Sequence[Finding]) -> str:
    """The page as plain text; fixes are numbered."""
    wrong = sum(finding.verdict == "wrong" for finding in findings)
    lines = ["nothing is wrong" if not wrong else f"{wrong} wrong; put right in this order:"]
    for number, finding in enumerate(findings, 1):
        mark = f"{number}." if finding.verdict == "wrong" else finding.verdict
        lines.append(f"{mark:<7}{finding.what}")
        if finding.remedy:
            lines.append(f"{_INDENT}-> {finding.remedy}")
        if finding.details:
            lines.append(textwrap.indent(finding.details, _INDENT + "   "))
    return "\n".join(lines)
