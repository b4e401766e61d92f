"""What a real ComfyUI loads of diffusion models' files: core_weights.py COMFYUI FOLDER OUT FILE...

OUT gets each network's tensors, as FILE/name.
"""

import sys

import shims
import torch
from safetensors.torch import save_file


def main(comfy_folder, folder, out_path, *names):
    shims.start_core(comfy_folder)
    import comfy.sd
    import comfy.supported_models

    comfy.supported_models.models.append(shims.narrow_sdxl(comfy.supported_models.SDXL))
    weights = {}
    for name in names:
        model = comfy.sd.load_diffusion_model(f"{folder}/{name}", model_options={"dtype": torch.float32})
        for key, tensor in model.model.diffusion_model.state_dict().items():
            weights[f"{name}/{key}"] = tensor.detach().float().contiguous().clone()
    save_file(weights, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
