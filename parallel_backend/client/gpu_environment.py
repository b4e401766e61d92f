"""The variables by which ranks' GPUs and links are chosen: a backend keeps those that it was started with."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from ..command_line import command_line
from ..rpc.runtime_dir import STARTED_WITH, BackendRecord
from .cards import hiding

_ORDER = "CUDA_DEVICE_ORDER"


def gpu_environment(env: Mapping[str, str], device: str) -> dict[str, str]:
    """Those of `env` that ranks on `device` heed."""
    prefixes = ("GLOO_",) if device == "cpu" else ("GLOO_", "NCCL_")
    chosen = (_ORDER, *hiding()) if device == "cuda" else ()
    return {name: value for name, value in env.items() if name.startswith(prefixes) or name in chosen}


def handed_on(env: Mapping[str, str], device: str) -> dict[str, str]:
    """How ranks learn what their backend is started with: their own variables may be others."""
    return {STARTED_WITH: json.dumps(gpu_environment(env, device))}


def unlike(record: BackendRecord, env: Mapping[str, str], cards: Collection[str] = ()) -> list[str]:
    """The variables that a running backend was started with otherwise than `env` has them.

    Args:
        cards: this process's GPUs by uuid. Where the ranks' are among them, it is no matter which variable chose them.
    """
    here, started = gpu_environment(env, record.device), gpu_environment(record.environment, record.device)
    same = (_ORDER, *hiding()) if any(record.cards) and set(record.cards) <= set(cards) else ()
    return sorted(key for key in here.keys() | started.keys() if here.get(key) != started.get(key) and key not in same)


def difference(
    name: str, record: BackendRecord, env: Mapping[str, str], cards: Collection[str] = ()
) -> tuple[str, str] | None:
    """What a running backend was started with otherwise than this process is, and how to change it; None where nothing.

    Args:
        cards: as for `unlike`.
    """
    other = unlike(record, env, cards)
    if not other:
        return None
    there = ", ".join(said(key, record.environment) for key in other)
    return (
        f"Backend {name!r} was started with {there}; here: {', '.join(said(key, env) for key in other)}.",
        f"It keeps to its own while others work with it. To start it anew, run `{command_line('stop', '--name', name)}`, then queue again.",
    )


def said(key: str, env: Mapping[str, str]) -> str:
    return f"{key}={env[key]}" if key in env else f"{key} unset"
