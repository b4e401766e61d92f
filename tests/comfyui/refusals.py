"""What a parallel MODEL refuses, as cases for twins.py."""

from contextlib import contextmanager
from unittest.mock import patch

import torch


def named(twins, words, run, model):
    """Zero where on the parallel MODEL `run` ends with an error that has all these words, before it has evaluated anything; what a
    local one says is ComfyUI's own.
    """
    if isinstance(model, twins.remote_model.RemotePatcher):
        with evaluations(model) as made:
            try:
                run(model)
            except Exception as error:  # noqa: BLE001 - its words are looked at
                missing = [word for word in words if word not in str(error)]
                assert not missing, f"{missing} not in: {type(error).__name__}: {error}"
            else:
                raise AssertionError("nothing was refused")
        assert not made, f"it was refused after {len(made)} evaluations"
    return torch.zeros(1, 4, 1, 1)


@contextmanager
def evaluations(model):
    """A list to which each evaluation is added that the ranks make for a sampler of ComfyUI's."""
    kind, made = type(model.remote), []
    plain = kind.forward

    def forward(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        made.append(out.shape)
        return out

    with patch.object(kind, "forward", forward):
        yield made


def refused(twins, words, make, model):
    """KSampler's latent without what is refused: with it a local MODEL gives another; a parallel one says these words and makes no step.

    Args:
        make: of a MODEL, the one to sample and the settings of that.
    """
    changed, given = make(model)
    without = {key: value for key, value in given.items() if key not in ("positive", "negative")}
    told, steps = "", []
    if not isinstance(model, twins.remote_model.RemotePatcher):
        assert twins.distance(model, twins.sample(changed, **given), twins.sample(model, **without)) > 1e-3
    else:
        try:
            twins.sample(changed, callback=lambda *step: steps.append(step), **given)
        except Exception as error:  # noqa: BLE001 - its words are looked at
            told = str(error)
        assert words in told and not steps, (told, len(steps))
    out = twins.sample(model, **without)  # the MODEL is as it was
    twins.said.append(told)
    return out
