"""KSampler's latents for a list of cases, on local MODELs of a real ComfyUI: reference.py COMFYUI MODEL CASES OUT.

CASES is a safetensors file of inputs whose metadata holds the cases as JSON, of which each may name another model file; OUT
gets one latent per case, and the sigmas of each schedule of each file, below its name where it isn't MODEL. `sampling` in a
case names a node for its model and its inputs; `sigmas` are in place of the scheduler's, and with `add_noise` False none is.
"""

import json
import os
import sys

import shims
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main(comfy_folder, model_path, cases_path, out_path):
    shims.start_core(comfy_folder)
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models
    import comfy_extras.nodes_differential_diffusion
    import comfy_extras.nodes_model_advanced

    comfy.supported_models.models.extend(shims.narrow_sdxl(comfy.supported_models))
    torch.set_num_threads(1)
    models, results = {}, {}
    with safe_open(cases_path, framework="pt") as file, torch.inference_mode():
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, case in json.loads(file.metadata()["cases"]).items():
            path = case.get("file", model_path)
            if path not in models:
                models[path] = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
            results[name] = latent_of(comfy, case, patched(comfy_extras, models[path], case), tensors).contiguous()
        for path, model in models.items():
            below = "" if path == model_path else f"{os.path.basename(path)}/"
            for scheduler in comfy.samplers.SCHEDULER_NAMES:
                for steps in (1, 2, 7, 20, 30):
                    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
                    results[f"{below}sigmas/{scheduler}/{steps}"] = sigmas.contiguous()
    save_file(results, out_path)


def patched(comfy_extras, model, case):
    """The MODEL after the nodes that the case names."""
    nodes = comfy_extras.nodes_model_advanced
    settings = dict(
        case.get("sampling", {"node": "ModelSamplingSD3", "shift": case["shift"]} if "shift" in case else {})
    )
    if settings:
        node = getattr(nodes, settings.pop("node"))()
        model = getattr(node, node.FUNCTION)(model, **settings)[0]
    if "rescale_cfg" in case:
        model = nodes.RescaleCFG().patch(model, case["rescale_cfg"])[0]
    if "differential" in case:
        node = comfy_extras.nodes_differential_diffusion.DifferentialDiffusion
        model = node.execute(model, case["differential"]).args[0]
    return model


def latent_of(comfy, case, model, tensors):
    latent = tensors[case["latent"]]
    noise = comfy.sample.prepare_noise(latent, case["seed"], case.get("batch_index"))
    if not case.get("add_noise", True):
        noise = comfy.sample.prepare_empty_noise(latent)
    prompts = [
        [[tensors[case[which]], {"pooled_output": tensors[case[which] + ".pooled"], **case.get("options", {})}]]
        for which in ("positive", "negative")
    ]
    settings = {
        "noise_mask": tensors[case["mask"]] if "mask" in case else None,
        "disable_pbar": True,
        "seed": case["seed"],
    }
    if "sigmas" in case:
        sampler, sigmas = comfy.samplers.sampler_object(case["sampler"]), torch.tensor(case["sigmas"])
        return comfy.sample.sample_custom(model, noise, case["cfg"], sampler, sigmas, *prompts, latent, **settings)
    denoise = case.get("denoise", 1.0)
    names = (case["sampler"], case["scheduler"])
    return comfy.sample.sample(
        model, noise, case["steps"], case["cfg"], *names, *prompts, latent, denoise=denoise, **settings
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
