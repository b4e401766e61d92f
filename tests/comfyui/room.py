"""Whether ComfyUI's own models leave when a rank lacks room: room.py COMFYUI PACK MODEL; prints what happened, as JSON.

The ranks are invented, since a shared GPU is needed for real ones; ComfyUI's memory management is the real one.
"""

import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import shims


def main(comfy_folder, pack, model_path):
    shims.install()
    sys.path.insert(0, os.path.abspath(comfy_folder))
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management as mm
    import comfy.sd

    spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    parallel_mesh = importlib.import_module("pack.nodes.parallel_mesh")

    model = comfy.sd.load_diffusion_model(model_path)  # held: ComfyUI forgets models that nobody holds
    mm.load_models_gpu([model])
    gib = 2**30
    outcomes = {}
    parallel_mesh.own_device = lambda: "cuda:1"
    here = importlib.import_module("pack.parallel_backend.rpc.runtime_dir").machine()
    cases = {
        "cpu": ("cpu", here, 0),
        "roomy": ("cuda:1", here, 20 * gib),
        "another GPU": ("cuda:0", here, 2 * gib),
        "another machine": ("cuda:1", "elsewhere", 2 * gib),
        "short": ("cuda:1", here, 2 * gib),
    }
    for name, (device, machine, free) in cases.items():
        ranks = [SimpleNamespace(rank=3, device=device, machine=machine, free_bytes=free)]
        backend = SimpleNamespace(status=lambda ranks=ranks: SimpleNamespace(ranks=ranks))
        said = parallel_mesh.make_room(backend, 10 * gib)
        outcomes[name] = {"said": said, "loaded": len(mm.loaded_models())}

    # A request that a rank has no memory for is made again once ComfyUI's models are gone, and no third time.
    errors = importlib.import_module("pack.parallel_backend.errors")
    remote_model = importlib.import_module("pack.nodes.remote_model")
    mm.load_models_gpu([model])
    held = []

    def request(should_cancel, enough=0):
        held.append(len(mm.loaded_models()))
        if held[-1] > enough:
            raise errors.OutOfMemoryError("Rank 0 is out of memory.", "")
        return "done"

    outcomes["again"] = {"said": remote_model.interruptible(request), "held": list(held)}
    held.clear()
    try:
        remote_model.interruptible(request, enough=-1)
    except errors.OutOfMemoryError:
        outcomes["in vain"] = {"held": held}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
