"""What a real ComfyUI loads of diffusion models' files: core_weights.py COMFYUI PACK FOLDER OUT FILE...

OUT gets each network's tensors, as FILE/name. What the pack gives ComfyUI's patching code of a file must be the same.
"""

import importlib.util
import sys
from pathlib import Path

import shims
import torch
from safetensors.torch import save_file


def main(comfy_folder, pack, folder, out_path, *names):
    shims.start_core(comfy_folder)
    import comfy.sd
    import comfy.supported_models

    comfy.supported_models.models.extend(shims.narrow_sdxl(comfy.supported_models))
    spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    base_weights = importlib.import_module("pack.nodes.base_weights").BaseWeights
    weights = {}
    for name in names:
        model = comfy.sd.load_diffusion_model(f"{folder}/{name}", model_options={"dtype": torch.float32})
        base = base_weights(Path(folder, name), model.model.model_config.unet_config)
        for key, tensor in model.model.diffusion_model.state_dict().items():
            assert torch.equal(base[key].float(), tensor.float()), (name, key)
            weights[f"{name}/{key}"] = tensor.detach().float().contiguous().clone()
    save_file(weights, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
