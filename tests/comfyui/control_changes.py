"""What becomes of a ControlNet after ComfyUI has loaded it, and of the MODEL that it is used with, for control_cases.py."""

import os
import shutil

import comfy.samplers
import torch


def with_new_forward(control, path):
    forward = control.control_model.forward
    control.control_model.forward = lambda *a, **k: {
        "output": [2 * x for x in forward(*a, **k)["output"]],
        "middle": [],
    }


def with_hook(control, path):
    control.control_model.zero_convs[0].register_forward_hook(lambda layer, given, out: 2 * out)


def with_new_merge(control, path):
    merge = control.control_merge
    control.control_merge = lambda control, *args, **more: merge(control | {"middle": []}, *args, **more)


def with_new_file(control, path):
    shutil.copy(os.path.join(os.path.dirname(path), "control-two.safetensors"), f"{path}.new")
    os.replace(f"{path}.new", path)


# What is no more as ComfyUI loaded it when the prompt is sampled.
CHANGES = {
    "whose network has another forward": with_new_forward,
    "whose layer has a hook": with_hook,
    "which merges otherwise": with_new_merge,
    "which another has replaced": with_new_file,
}


class Turned:
    """Of all prompts the ControlNets' pictures, as a node sees to it while it samples."""

    @torch.inference_mode()
    def __call__(self, args):
        controls = [entry.get("control") for entries in args["conds"] for entry in entries or ()]
        self.turn(controls)
        options = {key: value for key, value in args["model_options"].items() if value is not self}
        out = comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], options)
        self.turn(controls)
        return out

    def turn(self, controls):
        for control in {id(control): control for last in controls for control in before(last)}.values():
            control.cond_hint_original, control.cond_hint = control.cond_hint_original.flip(-1), None


def before(control):
    while control is not None:
        yield control
        control = control.previous_controlnet


def turning(model):
    model = model.clone()
    model.model_options["sampler_calc_cond_batch_function"] = Turned()
    return model


def with_tensor(model):
    model = model.clone()
    model.model_options["sigmas"] = torch.ones(3)
    return model
