"""How ComfyUI's own functions deal with a card that ranks share: room.py COMFYUI PACK MODEL; prints what happened, as JSON.

The ranks are invented, since a shared GPU is needed for real ones; ComfyUI's memory management is the real one.
"""

import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import core_dtypes
import shims
import torch


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
    core_memory = importlib.import_module("pack.nodes.core_memory")
    runtime_dir = importlib.import_module("pack.parallel_backend.rpc.runtime_dir")

    model = comfy.sd.load_diffusion_model(model_path)  # held: ComfyUI forgets models that nobody holds
    outcomes = {"rooms": rooms(mm, core_memory, runtime_dir.machine(), model)}
    outcomes |= twice(mm, core_memory, importlib.import_module("pack.parallel_backend.errors"), model)
    mm.unload_all_models()
    outcomes |= listed(mm, core_memory, model)
    outcomes["told"] = told(importlib.import_module("pack.nodes.core_dtype"))
    outcomes["dtypes"] = core_dtypes.choices(mm, importlib.import_module("comfy.supported_models"))
    print(json.dumps(outcomes))


def rooms(mm, core_memory, here, model):
    """What is said, and what of ComfyUI's own and of a backend's stays loaded, where a rank needs 10 GiB."""
    gib = 2**30
    core_memory.own_card = lambda: ("cuda", "GPU-own")
    parallel = held(core_memory, mm, "parallel", [])
    cases = {
        "cpu": ("cpu", "", here, 0, ()),
        "roomy": ("cuda:1", "GPU-own", here, 20 * gib, ()),
        "another GPU": ("cuda:0", "GPU-other", here, 2 * gib, ()),
        "another machine": ("cuda:1", "GPU-own", "elsewhere", 2 * gib, ()),
        "resident": ("cuda:1", "GPU-own", here, 2 * gib, ("model",)),
        "short": ("cuda:0", "GPU-own", here, 2 * gib, ("another",)),
    }
    outcomes = {}
    for name, (device, uuid, machine, free, models) in cases.items():
        mm.load_models_gpu([model])
        parallel.register()
        rank = SimpleNamespace(rank=3, device=device, uuid=uuid, machine=machine)
        state = SimpleNamespace(ranks=[rank], models=[SimpleNamespace(name=held) for held in models])
        core_memory.free_here = lambda free=free: free
        mm.get_free_memory = lambda device, torch_free_too=False, free=free: (free, 0) if torch_free_too else free
        said = core_memory.make_room(SimpleNamespace(status=lambda state=state: state), 10 * gib, "model")
        outcomes[name] = {"said": said, "loaded": sorted(type(loaded).__name__ for loaded in mm.loaded_models())}
    return outcomes


def twice(mm, core_memory, errors, model):
    """A request that a rank has no memory for is made again once ComfyUI's models are gone, and no third time."""
    mm.load_models_gpu([model])
    counted = []

    def request(should_cancel, enough=1):
        counted.append(len(mm.loaded_models()))
        if counted[-1] > enough:
            raise errors.OutOfMemoryError("Rank 0 is out of memory.", "")
        return "done"

    outcomes = {"again": {"said": core_memory.interruptible(request), "held": list(counted)}}
    counted.clear()
    try:
        core_memory.interruptible(request, enough=-1)
    except errors.OutOfMemoryError:
        outcomes["in vain"] = {"held": counted}
    return outcomes


def listed(mm, core_memory, model):
    """What happens to weights of backends, two MODELs of which are the same ones and one has no part here."""
    events = []
    mm.load_models_gpu([model])
    one, same, elsewhere = (
        held(core_memory, mm, name, events, size) for name, size in (("a", 100), ("a", 100), ("b", 1))
    )
    for patcher in (one, elsewhere, same, same.clone()):
        patcher.register()
    counts = [loaded.loaded_size() for loaded in mm.loaded_models() if loaded is not model]
    outcomes = {"counted": sorted(counts), "beside": model in mm.loaded_models(), "loads": list(events)}
    mm.unload_all_models()
    same.register()
    return outcomes | {"events": events}


def told(core_dtype):
    """The dtypes of a model and of a VAE where ComfyUI was started with a flag; the ranks' own choice is called after them."""
    backend = SimpleNamespace(model_dtype=lambda path: "for model", vae_dtype=lambda: "for vae")
    outcomes = {}
    for flag in (None, "bf16_unet", "fp32_vae", "fp16_vae", "force_fp32", "force_fp16"):
        core_dtype.args = SimpleNamespace(**({flag: True} if flag else {}))
        vae = core_dtype.vae_dtype(backend, "auto", overflows=True)
        outcomes[str(flag)] = [core_dtype.model_dtype(backend, None, "auto"), vae]
    named = [core_dtype.vae_dtype(backend, "float16", overflows=overflows) for overflows in (False, True)]
    return outcomes | {"asked": [core_dtype.model_dtype(backend, None, "float16"), *named]}


def held(core_memory, mm, name, events, size=2**30):
    """A parallel MODEL without a backend."""

    class Held(core_memory.WeightsElsewhere):
        @property
        def remote(self):
            return self.model.remote

    module = torch.nn.Module()
    spec = SimpleNamespace(name="default", address="")
    module.remote = SimpleNamespace(
        name=name,
        backend=SimpleNamespace(spec=spec),
        leave=lambda should_cancel: events.append(f"{name} leaves"),
        ensure_loaded=lambda should_cancel: events.append(f"{name} is back"),
    )
    patcher = Held(module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device(), size=size)
    patcher.note_held()
    return patcher


if __name__ == "__main__":
    main(*sys.argv[1:])
