"""What many tests share: small checkpoints, backends that live for the whole session, and a real ComfyUI if any."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import _lru_cache_wrapper
from pathlib import Path
from typing import Any

# Read when torch is imported: threads sleep while they wait for each other, here and in all that tests start; what goes on
# beside needs the core.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import pytest
import torch
import torch._inductor.config
from apart import Writer, apart, as_listed, show
from beside import run_beside
from comfyui.editor_page import VARIANTS, EditorPage, OpenEditor, chromium
from comfyui.installation import ComfyInstallation, find_installation
from comfyui.server import ComfyServer
from footprint import Footprint
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from served import sample
from sharing import Sharing, in_order
from torch import Tensor

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.errors import StartError
from parallel_backend.small_checkpoints.clip import write_clip
from parallel_backend.small_checkpoints.kl_vae import write_kl_vae
from parallel_backend.small_checkpoints.mmdit import FAMILIES, small_config, write_mmdit
from parallel_backend.small_checkpoints.mmdit_control import DOUBLE, INSTANTX, STABILITY, write_control
from parallel_backend.small_checkpoints.taesd import write_taesd
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet
from parallel_backend.small_checkpoints.unet_control import control_config, write_unet_control

torch.set_num_threads(2)
# Of all ranks of a backend together: the largest models of the tests leave when others come.
MODELS_BYTES = 512 * 2**20
# Ranks keep what they have freed, for speed; those of the tests, which live side by side, give it back.
GIVE_BACK_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**23), "MALLOC_TRIM_THRESHOLD_": str(2**26)}


# Modules of scripts/check --quick: those that answer within seconds, and one that speaks to a backend.
QUICK = frozenset(
    f"test_{name}"
    for name in (
        "allowed_files", "backend", "cards", "checkpoint", "config", "demo_files", "house", "memory", "methods",
        "published", "scenes", "scripts", "vae", "wire", "workflow_files",
    )
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def runtime_folder() -> Iterator[Path]:
    """Backends of the tests keep away from those of the person who runs them, and compiled code from that of other versions."""
    with tempfile.TemporaryDirectory(prefix="pm-") as folder:
        os.environ["PARALLEL_MMDIT_RUNTIME_DIR"] = folder
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
        os.environ |= GIVE_BACK_MEMORY
        # Compiled code is for what the processor says that it has; to try that out takes six seconds in each process.
        os.environ["TORCHINDUCTOR_VEC_ISA_OK"], torch._inductor.config.cpp.vec_isa_ok = "1", True
        yield Path(folder)


@pytest.fixture(scope="session", autouse=True)
def going_on(runtime_folder: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Any]]]:
    with run_beside(request.session.items, request.config.stash[APART]) as runs:
        request.config.stash[GOING_ON] = runs
        yield runs


@pytest.fixture(scope="module")
def ran_beside(going_on: dict[str, Future[Any]], request: pytest.FixtureRequest) -> Any:
    """What came of the run that has gone on beside other tests for this module."""
    return going_on[request.path.stem].result()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ComfyUI models folder with a small checkpoint of each kind."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_mmdit(root / "diffusion_models" / f"{family}.safetensors", small_config(family))
    write_taesd(root / "vae_approx", "taesd3", 16)
    write_taesd(root / "vae_approx", "taesdxl", 4)
    write_kl_vae(root / "vae" / "sd3_vae.safetensors", latent_channels=16, quant=False)
    write_kl_vae(root / "vae" / "sdxl_vae.safetensors", latent_channels=4, quant=True)
    return root


@pytest.fixture(scope="session")
def unets(models: Path) -> Path:
    """The folder in which are unet-tiny, unet-inpainting, unet-editing and unet-refiner."""
    folder = models / "diffusion_models"
    for name in ("tiny", "inpainting", "editing", "refiner"):
        write_unet(folder / f"unet-{name}.safetensors", CONFIGS[name], "single file")
    return folder


@pytest.fixture(scope="session")
def control_files(models: Path) -> Path:
    """The folder of models, with ControlNets for them beside."""
    folder = models / "diffusion_models"
    write_unet(folder / "unet-layers.safetensors", CONFIGS["two layers"], "single file")
    write_unet(folder / "unet-320.safetensors", CONFIGS["for unions"], "single file")
    config = control_config(CONFIGS["two layers"])
    write_unet_control(folder / "control-one.safetensors", config, "single file", seed=1)
    write_unet_control(folder / "control-two.safetensors", config, "single file", seed=2, prefix="control_model.")
    for family, kinds in (("sd3", (INSTANTX,)), ("sd3.5-large", (INSTANTX, STABILITY, DOUBLE))):
        base = small_config("sd3-medium" if family == "sd3" else family)
        for kind in kinds:
            write_control(folder / f"control-{family}-{kind}.safetensors", kind, base)
    return folder


@pytest.fixture(scope="session")
def workflow_models(models: Path) -> Path:
    """The same folder with the files that the workflows name: of their true layouts, small where that is allowed."""
    (models / "checkpoints").mkdir(exist_ok=True)
    for size in ("medium", "large"):
        mmdit = models / "diffusion_models" / f"sd3.5-{size}.safetensors"
        parts = [("model.diffusion_model.", mmdit), ("first_stage_model.", models / "vae" / "sd3_vae.safetensors")]
        whole = {prefix + name: tensor for prefix, file in parts for name, tensor in load_file(file).items()}
        save_file(whole, models / "checkpoints" / f"sd3.5_{size}.safetensors")
    vae = {f"first_stage_model.{n}": t for n, t in load_file(models / "vae" / "sdxl_vae.safetensors").items()}
    for name, config in (("base", "koala"), ("refiner", "comfy-refiner")):
        path = models / "checkpoints" / f"sd_xl_{name}_1.0.safetensors"
        write_unet(
            path, CONFIGS[config], "single file", prefix="model.diffusion_model.", dtype=torch.float16, extra=vae
        )
    controls = models / "controlnet"
    edges = controls / "diffusers_xl_canny_full.safetensors"
    write_unet_control(edges, control_config(CONFIGS["koala"]), "single file", dtype=torch.float16)
    write_control(controls / "sd3.5_large_controlnet_canny.safetensors", STABILITY, small_config("sd3.5-large"))
    write_clip(models / "text_encoders" / "clip_l.safetensors", width=768)
    write_clip(models / "text_encoders" / "clip_g.safetensors", width=1280, known_by=30)
    return models


SHARING = pytest.StashKey[Sharing]()
# The tests that run in a pytest of their own, and all that goes on beside this one's.
APART = pytest.StashKey[list[pytest.Item]]()
GOING_ON = pytest.StashKey[dict[str, Future[Any]]]()
FOOTPRINT = pytest.StashKey[Footprint]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="only the modules that start neither a ComfyUI nor many ranks"
    )
    parser.addoption(
        "--reports", type=Path, help="a file that gets each test's report, for the run that began this one"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOOTPRINT] = Footprint()
    if (file := config.getoption("--reports")) is not None:
        config.pluginmanager.register(Writer(file, config))
    else:  # who began this run looks at its processes too
        config.stash[FOOTPRINT].start()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(terminalreporter.config.stash[FOOTPRINT].told())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if item.path.stem not in QUICK])
        items[:] = [item for item in items if item.path.stem in QUICK]
    config.stash[APART] = elsewhere = apart(items)
    items[:] = as_listed(items) if config.getoption("--reports") else in_order(items, elsewhere)
    config.stash[SHARING] = Sharing()
    config.stash[SHARING].plan([item for item in items if item not in elsewhere])


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection need look at its half a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if item not in item.config.stash[APART]:
        return None
    show(item, item.config.stash[GOING_ON]["apart"].result()[item.nodeid])
    return True


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    item.config.stash[SHARING].after(item)
    if nextitem is not None and nextitem.path != item.path:
        item.config.stash[SHARING].after_module()
        for value in vars(item.module).values():  # type: ignore[attr-defined]
            if isinstance(value, _lru_cache_wrapper) and not value.__module__.startswith("parallel_"):
                value.cache_clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def sharing(pytestconfig: pytest.Config) -> Sharing:
    return pytestconfig.stash[SHARING]


def _backend(world_size: int) -> Backend:
    return Backend(world_size, "cpu", f"test{world_size}", memory_budget=MODELS_BYTES // world_size)


@pytest.fixture(scope="session")
def backend2(runtime_folder: Path, sharing: Sharing) -> Iterator[Backend]:
    yield from sharing.until_last_use("backend2", _backend(2), Backend.stop, Backend.unload)


@pytest.fixture(scope="session")
def backend4(runtime_folder: Path, sharing: Sharing) -> Iterator[Backend]:
    yield from sharing.until_last_use("backend4", _backend(4), Backend.stop, Backend.unload)


@pytest.fixture(scope="session")
def large(models: Path) -> Path:
    return models / "diffusion_models" / "sd3.5-large.safetensors"


@pytest.fixture
def model(backend2: Backend, large: Path) -> RemoteModel:
    return backend2.load_model(large, MeshSpec(cfg=2), "float32")


@pytest.fixture(scope="session")
def expected(backend2: Backend, large: Path) -> Tensor:
    """What `model` makes of the job that `sample` gives it."""
    return sample(backend2.load_model(large, MeshSpec(cfg=2), "float32"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Runs a function on N gloo ranks; the ranks of each N are started once a module, and keep no other module's models."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def comfy() -> ComfyInstallation:
    found = find_installation()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def begun_server(
    comfy: ComfyInstallation,
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    runtime_folder: Path,
    sharing: Sharing,
) -> Iterator[ComfyServer]:
    """`server` on its way: for modules that have other things to do meanwhile."""
    # Core itself lets pages of any origin ask: where one is refused, it is by this pack.
    begun = ComfyServer(comfy, tmp_path_factory.mktemp("comfyui"), models, ["--enable-cors-header", "*"])
    yield from sharing.until_last_use("server", begun, ComfyServer.stop)


@pytest.fixture(scope="session")
def server(begun_server: ComfyServer) -> ComfyServer:
    """A real ComfyUI with this pack; files that are written below `models` later are listed too."""
    begun_server.wait()
    return begun_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's Chromium. One a module: while it is open, nothing else may run an event loop in this thread."""
    try:
        with chromium() as opened:
            yield opened
    except ImportError:
        pytest.skip("no playwright: pip install '.[test]'")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def open_editor(server: ComfyServer, browser: Any) -> Iterator[OpenEditor]:
    """Opens the editor of `server` as `EditorPage` says (variant, theme, size, settings); closed after the test."""
    opened: list[EditorPage] = []

    def open_one(*args: Any, **kwargs: Any) -> EditorPage:
        opened.append(EditorPage(browser, server, *args, **kwargs))
        return opened[-1]

    yield open_one
    for editor in opened:
        editor.close()


@pytest.fixture(params=VARIANTS)
def editor(open_editor: OpenEditor, request: pytest.FixtureRequest) -> EditorPage:
    """The editor of `server`, once in its classic form and once with Nodes 2.0; `open_editor` for one of them."""
    return open_editor(request.param)


@pytest.fixture(scope="module", params=VARIANTS)
def kept_editor(server: ComfyServer, browser: Any, request: pytest.FixtureRequest) -> Iterator[EditorPage]:
    """`editor`, one of each form for all tests of a module: to open one takes six seconds of a core."""
    opened = EditorPage(browser, server, request.param)
    yield opened
    opened.close()


def _stop(name: str) -> None:
    """The backend of that name, if any test has let it start."""
    with suppress(StartError):
        Backend.attach(name).stop()


@pytest.fixture(scope="session")
def comfy_backend(server: ComfyServer, sharing: Sharing) -> Iterator[str]:
    """The name of the backend that tests' prompts start in `server`."""
    yield from sharing.until_last_use("comfy_backend", "comfy", _stop)


@pytest.fixture(scope="session")
def default_backend(server: ComfyServer, sharing: Sharing) -> Iterator[str]:
    """The name of the backend that this pack's workflows start in `server`."""
    yield from sharing.until_last_use("default_backend", "default", _stop)
