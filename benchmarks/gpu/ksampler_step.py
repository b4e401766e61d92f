"""How long KSampler's step takes in a real ComfyUI: ksampler_step.py COMFYUI MODEL INPUTS OUT SETTINGS, in its own Python.

Prints one line of JSON last: the dtype that ComfyUI has chosen for this card and file, and milliseconds a step.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tests", "comfyui"))
import shims
import torch
from safetensors.torch import load_file, save_file


def main(comfy_folder, model_path, inputs, out, settings):
    settings = json.loads(settings)
    shims.install()
    sys.path.insert(0, os.path.abspath(comfy_folder))
    sys.argv = ["main.py", *(["--cpu"] if settings["device"] == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    with torch.inference_mode():
        given = load_file(inputs)
        model = ModelSamplingSD3().patch(comfy.sd.load_diffusion_model(model_path), settings["shift"])[0]
        prompts = [[[given[f"{w}.context"], {"pooled_output": given[f"{w}.pooled"]}]] for w in ("cond", "uncond")]

        def run(steps):
            noise = comfy.sample.prepare_noise(given["latent"], 1)
            begun = time.perf_counter()
            latent = comfy.sample.sample(
                model,
                noise,
                steps,
                settings["cfg"],
                "euler",
                "simple",
                *prompts,
                given["latent"],
                disable_pbar=True,
                seed=1,
            )  # on the CPU, so it has waited for the GPU
            return latent, time.perf_counter() - begun

        run(settings["short"])
        _, short = run(settings["short"])
        latent, long = run(settings["long"])
    save_file({"latent": latent.float().cpu().contiguous()}, out)
    per_step = (long - short) / (settings["long"] - settings["short"]) * 1000
    dtype = str(model.model.get_dtype()).removeprefix("torch.")
    print(json.dumps({"dtype": dtype, "ms": per_step}))


if __name__ == "__main__":
    main(*sys.argv[1:])
