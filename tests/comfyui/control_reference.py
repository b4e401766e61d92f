"""What a real ComfyUI's ControlNets of SD3 give its MMDiT: control_reference.py COMFYUI CASES OUT.

CASES is a safetensors file of inputs whose metadata holds the cases as JSON: the files of a ControlNet and of its main model.
OUT gets `NAME/INDEX` for each tensor that core adds, in its order, and `NAME/velocity` of the main model steered by them.
"""

import json
import sys

import shims
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main(comfy_folder, cases_path, out_path):
    shims.start_core(comfy_folder)
    import comfy.controlnet
    import comfy.sd

    torch.set_num_threads(1)
    results = {}
    with safe_open(cases_path, framework="pt") as file, torch.inference_mode():
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, case in json.loads(file.metadata()["cases"]).items():
            control = comfy.controlnet.load_controlnet(case["control"])
            model = comfy.sd.load_diffusion_model(case["main"], model_options={"dtype": torch.float32}).model
            control.pre_run(model, model.model_sampling.percent_to_sigma)
            x, timesteps, context, pooled = (
                tensors[f"{name}/{part}"] for part in ("x", "timesteps", "context", "pooled")
            )
            hint = tensors[f"{name}/hint"]
            found = control.control_model(x=x, timesteps=timesteps, y=pooled, context=context, hint=hint)
            outputs = list(found["output"])
            for index, out in enumerate(outputs):
                results[f"{name}/{index}"] = out.clone().contiguous()
            steered = {"output": [out.clone() for out in outputs]}
            velocity = model.diffusion_model(x, timesteps, context=context, y=pooled, control=steered)
            results[f"{name}/velocity"] = velocity.contiguous()
    save_file(results, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
