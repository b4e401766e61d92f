"""What acts between model calls: functions, wrappers and callbacks of a MODEL."""

from __future__ import annotations

from collections.abc import Iterator

from comfy.model_patcher import ModelPatcher


def loop_patches(model: ModelPatcher) -> Iterator[str]:
    """What hangs on the MODEL and acts between model calls: it can run only where ComfyUI runs the loop."""
    for key, value in model.model_options.items():
        if key != "transformer_options" and value:
            yield f"model option {key!r}"
    for kinds, what in ((model.wrappers, "wrapper"), (model.callbacks, "callback")):
        for kind, by_key in kinds.items():
            for key, entries in by_key.items():
                if entries:
                    yield f"{what} {kind} of {key or 'another node'}"
    for kind in ("wrappers", "callbacks"):
        for name, by_key in model.model_options.get("transformer_options", {}).get(kind, {}).items():
            if any(by_key.values()):
                yield f"{kind[:-1]} {name}"
