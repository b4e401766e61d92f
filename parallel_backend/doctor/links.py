"""Ranks as a backend would have them, started for this: on GPUs a link that is broken is silent, and is met in no other way."""

from __future__ import annotations

from collections.abc import Iterator

from ..client.cards import choose_ranks, seen
from ..client.links import measure_links, prove_links
from ..config import BackendSpec
from ..errors import BackendError, ConfigError
from .finding import Finding, wrong


def links() -> Iterator[Finding]:
    here = seen()
    ranks = choose_ranks(here, "cuda" if here.cards else "cpu")
    if ranks.count < 2:
        return
    try:
        figures = prove_links(BackendSpec("doctor", ranks.count, ranks.device, ranks.devices))
    except BackendError as error:
        yield wrong(error)
        return
    yield from (Finding("ok", f"{ranks.count} ranks on {ranks.device}: {figure}") for figure in figures)


def print_links() -> None:
    """Prints what messages of each kind take between ranks as a backend would have them.

    Raises: ConfigError: there is one rank alone. StartError: they don't hear each other.
    """
    here = seen()
    ranks = choose_ranks(here, "cuda" if here.cards else "cpu")
    if ranks.count < 2:
        raise ConfigError("One GPU has no link to another.", "Nothing is to be measured here.")
    print(f"{ranks.count} ranks on {ranks.device}; seconds and bytes are one rank's\n")
    print("| message | bytes sent | ms | GB/s |\n|---|---|---|---|")
    for kind, nbytes, seconds in measure_links(BackendSpec("doctor", ranks.count, ranks.device, ranks.devices)):
        print(f"| {kind} | {nbytes:,} | {seconds * 1000:.3f} | {nbytes / seconds / 1e9:.2f} |")
