"""How ComfyUI's own functions deal with a card that ranks share: room.py COMFYUI PACK MODEL; prints what happened, as JSON.

The ranks are invented, since a shared GPU is needed for real ones; ComfyUI's memory management is the real one.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import core_dtypes
import shims
import torch


def main(comfy_folder, pack, model_path):
    shims.start_core(comfy_folder)
    import comfy.model_management as mm
    import comfy.sd

    spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    core_memory = importlib.import_module("pack.nodes.core_memory")
    runtime_dir = importlib.import_module("pack.parallel_backend.rpc.runtime_dir")

    errors, messages = (importlib.import_module(f"pack.parallel_backend.{part}") for part in ("errors", "rpc.messages"))
    model = comfy.sd.load_diffusion_model(model_path)  # held: ComfyUI forgets models that nobody holds
    outcomes = {"rooms": rooms(mm, core_memory, runtime_dir.machine(), model)}
    outcomes |= twice(mm, core_memory, errors, messages, model)
    mm.unload_all_models()
    outcomes |= listed(mm, core_memory, model)
    mm.unload_all_models()
    outcomes["ends"] = ends(mm, core_memory, errors)
    outcomes["gone"] = gone(mm, core_memory, errors)
    mm.unload_all_models()
    outcomes["neighbours"] = neighbours(mm, core_memory)
    outcomes["own backends"] = own_backends(importlib.import_module("pack.nodes.routes"))
    outcomes["everywhere"] = everywhere_at_start(importlib.import_module("pack.nodes.everywhere"), errors)
    outcomes["told"] = told(importlib.import_module("pack.nodes.core_dtype"))
    outcomes["asked"] = asked(importlib.import_module("pack.nodes.load_models"), model_path)
    outcomes["without bfloat16"] = mm.AMD_RDNA2_AND_OLDER_ARCH
    outcomes["dtypes"] = core_dtypes.choices(mm, importlib.import_module("comfy.supported_models"))
    print(json.dumps(outcomes))


def asked(load_models, path):
    """What a backend is asked for, and what the node says, by Mesh Config's dtype, its compile and the loader's dtype."""
    backend = SimpleNamespace(status=lambda: None)
    loaded = SimpleNamespace(family="sd3", resident_bytes=[1], bytes_read=[1], seconds=1.0, evicted=[], notes=[])

    def ask(path, mesh, dtype, kernel, name, **settings):
        return SimpleNamespace(dtype="float32", held_as="", weights="", asked={"dtype": dtype, **settings})

    backend.asked = ask
    load_models.make_room = lambda *args: ""
    load_models.interruptible = lambda backend, call, load, **_: SimpleNamespace(load=load, loaded=loaded)
    backend.load_asked, outcomes = None, {}
    for dtype, compiles, of_loader in (
        ("auto", False, "torch.float8_e4m3fn"),
        ("auto", True, "torch.float8_e4m3fn"),
        ("fp8", True, "torch.float8_e4m3fn"),
        ("bfloat16", False, "torch.float8_e5m2"),
    ):
        degrees = importlib.import_module("pack.parallel_backend").MeshSpec(tp=2)
        mesh = SimpleNamespace(
            backend=lambda: backend, mmdit=degrees, dtype=dtype, compile=compiles, graphs=False, kernel="auto"
        )
        mesh.nan_is_error, mesh.notes, mesh.differs = False, {"mmdit": ""}, lambda: ""
        remote, said = load_models.load_remote_model(mesh, "mmdit", Path(path), "", {"dtype": of_loader})
        outcomes[f"{dtype} {compiles} {of_loader}"] = [remote.load.asked["dtype"], said.splitlines()[-1]]
    return outcomes


def everywhere_at_start(everywhere, errors):
    """Whether every MODEL is made parallel when ComfyUI starts: by its environment variable and the stored setting."""
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        everywhere.folder_paths.set_user_directory(folder)
        settings = Path(folder, "default", "comfy.settings.json")
        settings.parent.mkdir()
        for stored in ("", "{", '{"ParallelMMDiT.Everywhere": false}', '{"ParallelMMDiT.Everywhere": true}'):
            if stored:
                settings.write_text(stored)
            for variable in ("", "0", "1", "yes"):
                os.environ["PARALLEL_MMDIT_EVERYWHERE"] = variable
                try:
                    outcomes[f"{variable} {stored}".strip()] = everywhere.Everywhere().on
                except errors.ConfigError as error:
                    outcomes[f"{variable} {stored}".strip()] = str(error)
    del os.environ["PARALLEL_MMDIT_EVERYWHERE"]
    return outcomes


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
        "resident": ("cuda:1", "GPU-own", here, 2 * gib, ("key/float16/auto",)),
        "short": ("cuda:0", "GPU-own", here, 2 * gib, ("another key/float16/auto", "key/float32/auto")),
    }
    outcomes = {}
    for name, (device, uuid, machine, free, models) in cases.items():
        mm.load_models_gpu([model])
        parallel.register()
        rank = SimpleNamespace(rank=3, device=device, uuid=uuid, machine=machine)
        state = SimpleNamespace(ranks=[rank], models=[SimpleNamespace(name="model", model=held) for held in models])
        core_memory.free_here = lambda free=free: free
        mm.get_free_memory = lambda device, torch_free_too=False, free=free: (free, 0) if torch_free_too else free
        said = core_memory.make_room(SimpleNamespace(status=lambda state=state: state), 10 * gib, "key/float16/")
        outcomes[name] = {"said": said, "loaded": sorted(type(loaded).__name__ for loaded in mm.loaded_models())}
    return outcomes


def twice(mm, core_memory, errors, messages, model):
    """A request that a rank of ComfyUI's own device has no memory for is made again once ComfyUI's models are gone, and no third time."""
    counted = []
    state = messages.BackendState("", "", "", ranks=[messages.RankState(0, "", "", 0, "cuda:0", "", 0, 0, 0)])
    backend = SimpleNamespace(status=lambda *_: state, spec=SimpleNamespace(name="room"))

    def request(should_cancel, enough=1):
        counted.append(len(mm.loaded_models()))
        if counted[-1] > enough:
            raise errors.OutOfMemoryError("Rank 0 is out of memory.", "")
        return "done"

    outcomes = {}
    for how, ranks, enough in (("of others", [], 1), ("again", state.ranks, 1), ("in vain", state.ranks, -1)):
        core_memory.ranks_here = lambda _, ranks=ranks: ranks
        if how != "in vain":
            mm.load_models_gpu([model])
        counted.clear()
        try:
            said = core_memory.interruptible(backend, request, enough=enough)
        except errors.OutOfMemoryError:
            said = "no memory"
        outcomes[how] = {"said": said, "held": list(counted)}
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
    return outcomes | {"events": list(events)}


def ends(mm, core_memory, errors):
    """What ComfyUI's thread of prompts meets where a backend can't let go: what it was told, and what counts as loaded then."""

    def cancelled(should_cancel):
        raise errors.CancelledError("") if should_cancel() else AssertionError("not interrupted")

    def closed(should_cancel):
        raise errors.ConfigError("closed", "")

    outcomes = {}
    for how, leave in (("interrupted", cancelled), ("closed", closed)):
        patcher = held(core_memory, mm, how, [])
        patcher.register()
        patcher.remote.leave = leave
        mm.interrupt_current_processing(how == "interrupted")
        mm.unload_all_models()
        outcomes[how] = [mm.processing_interrupted(), patcher.loaded_size(), len(mm.loaded_models())]
        mm.interrupt_current_processing(False)
    return outcomes


def gone(mm, core_memory, errors):
    """Whether weights are loaded again for the next use, where the backend has kept, lost, or doesn't tell of them."""

    def silent(should_cancel):
        raise errors.RankError("no answer", "")

    outcomes = {}
    for how, is_held in (("kept", lambda _: True), ("lost", lambda _: False), ("silent", silent)):
        events = []
        patcher = held(core_memory, mm, "a", events)
        patcher.register()
        patcher.remote.is_held = is_held
        patcher.register()
        outcomes[how] = [*events, patcher.loaded_size()]
        mm.unload_all_models()
    return outcomes


def neighbours(mm, core_memory):
    """What leaves a full GPU when another MODEL of a backend, or of another backend, is registered; what room is asked for."""
    gib, gpu = 2**30, torch.device("cuda", 0)
    outcomes, asked, free_memory = {}, [], mm.free_memory
    mm.get_free_memory = lambda device, torch_free_too=False: (0, 0) if torch_free_too else 0
    mm.soft_empty_cache = lambda force=False: None
    mm.get_all_torch_devices = lambda *_, **__: [gpu]

    def free(required, *args, **kwargs):
        asked.append(required)
        return free_memory(required, *args, **kwargs)

    mm.free_memory = free
    for how, backend in (("same", "default"), ("another", "mine")):
        events = []
        one, two = (held(core_memory, mm, name, events, gib, gpu) for name in "ab")
        two.remote.backend.spec.name = backend
        one.register()
        two.register()
        outcomes[how] = list(events)
        mm.unload_all_models()
    return outcomes | {"activations": asked[0] - mm.extra_reserved_memory() == core_memory.ACTIVATION_BYTES}


def own_backends(routes):
    """Which backends ComfyUI's /free empties: of two connections to one, one to another machine, and one that is gone."""

    class Attached:
        def __init__(self, name, address=""):
            self.spec = SimpleNamespace(name=name, address=address)

    kept = [Attached("mine"), Attached("mine"), Attached("remote", "tcp://elsewhere:1")]
    for backend in [*kept, Attached("left")]:
        routes.ParallelMesh.attached.add(backend)
    del backend
    return routes.own_names()


def told(core_dtype):
    """The dtypes of a model and of a VAE where ComfyUI was started with a flag; the ranks' own choice for a VAE is called after it."""
    backend = SimpleNamespace(vae_dtype=lambda: "for vae")
    outcomes = {}
    for flag in (None, "bf16_unet", "fp32_vae", "fp16_vae", "force_fp32", "force_fp16", "fp8_e5m2_unet"):
        core_dtype.args = SimpleNamespace(**({flag: True} if flag else {}))
        outcomes[str(flag)] = [core_dtype.model_dtype("auto"), core_dtype.vae_dtype(backend, "auto")]
    outcomes["asked"] = [core_dtype.model_dtype("float16"), core_dtype.vae_dtype(backend, "float16")]
    outcomes["fp8"] = [core_dtype.model_dtype("fp8"), core_dtype.vae_dtype(backend, "fp8")]
    outcomes["computed in"] = {}
    for flag in ("bf16_unet", "force_fp32", "force_fp16"):
        core_dtype.args = SimpleNamespace(**{flag: True})
        held = ("fp8", "float8_e4m3fn")
        outcomes["computed in"][flag] = [core_dtype.computing_dtype(dtype) for dtype in held]
    core_dtype.args = SimpleNamespace(fp16_vae=True, fp64_unet=True)
    outcomes["told"] = [core_dtype.unheeded(asked) for asked in ("float16", "auto")]
    options = {"dtype": "torch.float8_e4m3fn", "fp8_optimizations": True}
    outcomes["products"] = [core_dtype.fp8_products(options), core_dtype.fp8_products({})]
    fast = importlib.import_module("comfy.cli_args").PerformanceFeature.Fp8MatrixMultiplication
    core_dtype.args = SimpleNamespace(fast={fast}, supports_fp8_compute=True)
    outcomes["products"].append(core_dtype.fp8_products({}))
    return outcomes


def held(core_memory, mm, name, events, size=2**30, device=None):
    """A parallel MODEL without a backend."""

    class Held(core_memory.WeightsElsewhere):
        @property
        def remote(self):
            return self.model.remote

    module = torch.nn.Module()
    spec = SimpleNamespace(name="default", address="")
    module.remote = SimpleNamespace(
        name=name,
        file=f"{name}.safetensors",
        backend=SimpleNamespace(spec=spec),
        leave=lambda should_cancel: events.append(f"{name} leaves"),
        is_held=lambda should_cancel: [event for event in events if event.startswith(name)][-1:] != [f"{name} leaves"],
        ensure_loaded=lambda should_cancel: events.append(f"{name} is back"),
    )
    device = device or mm.get_torch_device()
    patcher = Held(module, load_device=device, offload_device=mm.unet_offload_device(), size=size)
    patcher.note_held()
    return patcher


if __name__ == "__main__":
    main(*sys.argv[1:])
