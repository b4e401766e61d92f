"""What a parallel MODEL refuses, as cases for twins.py."""

import torch


def named(twins, words, run, model):
    """Zero where on the parallel MODEL `run` ends with an error that has all these words; what a local one says is ComfyUI's own."""
    if isinstance(model, twins.remote_model.RemotePatcher):
        try:
            run(model)
        except Exception as error:  # noqa: BLE001 - its words are looked at
            missing = [word for word in words if word not in str(error)]
            assert not missing, f"{missing} not in: {type(error).__name__}: {error}"
        else:
            raise AssertionError("nothing was refused")
    return torch.zeros(1, 4, 1, 1)


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
