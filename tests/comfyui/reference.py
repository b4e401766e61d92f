"""KSampler's latents for a list of cases, on local MODELs of a real ComfyUI: reference.py COMFYUI MODEL CASES OUT.

CASES is a safetensors file of inputs whose metadata holds the cases as JSON, of which each may name another model file; OUT
gets one latent per case, and the sigmas of each schedule of each file, below its name where it isn't MODEL.
"""

import json
import os
import sys

import shims
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main(comfy_folder, model_path, cases_path, out_path):
    shims.install()
    sys.path.insert(0, os.path.abspath(comfy_folder))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.supported_models
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    comfy.supported_models.models.append(shims.narrow_sdxl(comfy.supported_models.SDXL))
    torch.set_num_threads(2)
    models, results = {}, {}
    with safe_open(cases_path, framework="pt") as file, torch.inference_mode():
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, case in json.loads(file.metadata()["cases"]).items():
            path = case.get("file", model_path)
            if path not in models:
                models[path] = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
            model = models[path]
            patched = ModelSamplingSD3().patch(model, case["shift"])[0] if "shift" in case else model
            latent = tensors[case["latent"]]
            prompts = [
                [[tensors[case[which]], {"pooled_output": tensors[case[which] + ".pooled"], **case.get("options", {})}]]
                for which in ("positive", "negative")
            ]
            results[name] = comfy.sample.sample(
                patched,
                comfy.sample.prepare_noise(latent, case["seed"], case.get("batch_index")),
                case["steps"],
                case["cfg"],
                case["sampler"],
                case["scheduler"],
                *prompts,
                latent,
                denoise=case.get("denoise", 1.0),
                noise_mask=tensors[case["mask"]] if "mask" in case else None,
                disable_pbar=True,
                seed=case["seed"],
            ).contiguous()
        for path, model in models.items():
            below = "" if path == model_path else f"{os.path.basename(path)}/"
            for scheduler in comfy.samplers.SCHEDULER_NAMES:
                for steps in (1, 2, 7, 20, 30):
                    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
                    results[f"{below}sigmas/{scheduler}/{steps}"] = sigmas.contiguous()
    save_file(results, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
