"""The Python face: a backend, and the models in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint_files.content import content_key
from ..checkpoint_files.diffusion_part import BARE_FP8, QUANTISED, is_from_scratch, packing
from ..checkpoint_files.hub import local_path
from ..checkpoint_files.layout import vae_folder
from ..command_line import command_line
from ..config import AUTO, CAST_TO, DEFAULT_IDLE_SECONDS, FP8, WEIGHTS, BackendSpec, DeviceType, MeshSpec
from ..errors import (
    BackendLostError,
    StartError,
)
from ..rpc import runtime_dir as files
from ..rpc.messages import (
    Adjust,
    LoadModel,
    LoadVAE,
    ModelKind,
    Stop,
    Unload,
)
from ..text_encoders.protocol import TextEncoders
from . import dtypes, launcher
from .cards import choose_ranks, seen
from .connection import Connection, OnEvent
from .ending import kill
from .names import DEFAULT, backend_name, meant
from .pipeline_parts import Paths, PipelineParts
from .places import Elsewhere, Place, ThisMachine
from .remote import RemoteModel
from .remote_control import RemoteControl
from .remote_vae import RemoteVAE


class Backend(Connection):
    """A connection to the ranks of one name, with all that they can be asked for. One request at a time; use one Backend
    per thread that must not wait. `attach` and `attach_remote` find one that runs.

        with Backend() as backend:
            model = backend.load_model("sd3.5_medium.safetensors")

    The block's end closes the connection. The ranks run on with what they hold, so that the next program loads nothing; `stop`
    ends them. A lost backend is an error of the request under way; the next request finds the restarted ranks and loads its
    model again.
    """

    def __init__(
        self,
        world_size: int | None = None,
        device: DeviceType | None = None,
        name: str = DEFAULT,
        *,
        devices: Sequence[int] = (),
        idle_seconds: float | None = None,
        memory_budget: int | None = None,
        waiting: launcher.Waiting = launcher.unheard,
    ) -> None:
        """The backend of that name, ready: the one that runs, or one started now.

        Without `world_size` and `device`: all GPUs of the best one's kind, or two CPU ranks where there is none. The default
        name is one for each set of GPUs that a process sees. A running backend takes over the idle time and the memory budget
        (bytes on a rank, 0 for none) that are given.

        Raises:
            BackendInUseError: one of that name runs with other ranks, and somebody works with it; else it is restarted.
            StartError: it did not come up; the details have the end of its log.
        """
        here = seen(device)
        ranks = choose_ranks(here, device, world_size, devices)
        name = backend_name(name, ranks.device, here)
        settings = Adjust(idle_seconds, memory_budget)
        idle, budget = DEFAULT_IDLE_SECONDS if idle_seconds is None else idle_seconds, memory_budget or 0
        spec = BackendSpec(name, ranks.count, ranks.device, ranks.devices, idle, budget)
        place = ThisMachine(spec, settings)
        super().__init__(spec, place, place.first(waiting))

    @classmethod
    def _found(cls, spec: BackendSpec, place: Place, record: files.BackendRecord) -> Backend:
        """One that runs."""
        backend = cls.__new__(cls)
        Connection.__init__(backend, spec, place, record)
        return backend

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def attach(cls, name: str | None = None) -> Backend:
        """The running backend of that name, whatever its ranks are; without one, as of `meant`.

        Raises: StartError: none runs.
        """
        name = meant(name)
        record = files.read_record(name)
        if record is None:
            others = ", ".join(files.running_names())
            remedy = f"These run: {others}." if others else f"Start one with `{command_line('serve')}`."
            raise StartError(f"No backend {name!r} runs.", remedy)
        spec = BackendSpec(name, record.world_size, record.device, tuple(record.devices))  # type: ignore[arg-type]
        return cls._found(spec, ThisMachine(spec, as_it_is=True), record)

    @classmethod
    def attach_remote(cls, address: str, keys: str | os.PathLike[str], world_size: int = 0) -> Backend:
        """The backend that listens at `address` (tcp://host:port) on another machine.

        Args:
            keys: the folder with `client.key_secret` and `server.key`.
            world_size: refuse it with another number of ranks; 0 takes it as it is.
        Raises: BackendLostError: nothing there answers to these keys. ConfigError: other ranks, or keys that can't be read.
        """
        spec = BackendSpec("remote", world_size, address=address, keys=os.fspath(keys))
        place = Elsewhere(spec)
        return cls._found(spec, place, place.first())

    def load_model(
        self,
        path: str | os.PathLike[str],
        mesh: MeshSpec | None = None,
        dtype: str = AUTO,
        kernel: str = "auto",
        *,
        kind: ModelKind = "any",
        compile: bool = False,
        graphs: bool = False,
        name: str = "",
        computes: str = AUTO,
        fast_fp8: bool = False,
        has_fp8: bool = False,
        text_encoders: Paths | TextEncoders | None = None,
        vae: Paths | RemoteVAE | None = None,
        tokenizers: Paths = (),
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteModel:
        """An SD3, SD3.5 or SDXL model, resident and sharded. A file that is resident already is not read again.

        Args:
            path: a checkpoint, a pipeline's folder, or its name on the Hugging Face hub, from where it was downloaded before.
            dtype: auto is ComfyUI's choice for the ranks' cards; float32 on CPUs. fp8 holds weights of half precision in fp8, a
                scale for each row, float8_e4m3fn and float8_e5m2 cast them, which are computed with in `computes`.
            mesh: None takes as many ranks for a picture as make it faster, by the predictor's tables; what is left is dp.
            kind: refuses a file of another one.
            compile: torch.compile of the repeated blocks; their first step in each kind of shape takes much longer.
            graphs: on GPUs, each kind of evaluation is a CUDA graph from its second time on: a step costs the host next to
                nothing. Steps of PipeFusion run without. Not together with a sliced mesh.
            name: of the same file on a remote backend, below its model folders; the file's own name where left out.
            fast_fp8, has_fp8: see LoadModel.
            text_encoders, vae: for `generate`, which reads them when it first needs them. None: those of the checkpoint. Encoders
                are safetensors files or folders of CLIP-L, CLIP bigG and T5-XXL in any order, or an object that encodes itself.
            tokenizers: folders of the encoders' tokenizers, where none lies beside them.
        Raises: CheckpointError, ConfigError.
        """
        path = local_path(Path(path))
        parts = PipelineParts(self, _absolute(path), text_encoders, vae, tokenizers, name)
        fp8: dict[str, Any] = {"computes": computes, "fast_fp8": fast_fp8, "has_fp8": has_fp8}
        load = self.asked(path, mesh, dtype, kernel, name, kind=kind, compile=compile, graphs=graphs, **fp8)
        model = self.load_asked(load, on_event=on_event, should_cancel=should_cancel)
        model.parts = parts
        return model

    def load_asked(
        self,
        load: LoadModel,
        *,
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteModel:
        """What `asked` gave, loaded; else as `load_model`."""
        return RemoteModel(self, load, self.load(load, on_event, should_cancel))

    def asked(
        self,
        path: str | os.PathLike[str],
        mesh: MeshSpec | None,
        dtype: str,
        kernel: str,
        name: str = "",
        *,
        computes: str = AUTO,
        fast_fp8: bool = False,
        has_fp8: bool = False,
        **settings: Any,
    ) -> LoadModel:
        """What `load_model` asks for, with the same settings, less those that mean nothing to this file.

        Raises: CheckpointError.
        """
        file = _absolute(path)
        packed = packing(file) if dtype in WEIGHTS or fast_fp8 or has_fp8 else ""
        weights = dtype if (dtype in CAST_TO and packed != QUANTISED) or (dtype == FP8 and not packed) else ""
        computes = computes if dtype in WEIGHTS else dtype
        fp8: dict[str, Any] = {
            "weights": weights,
            "fast_fp8": fast_fp8 and (packed == BARE_FP8 or weights in CAST_TO),
            "has_fp8": has_fp8 and bool(packed or weights in CAST_TO),
        }
        dtype = self.model_dtype(file) if computes == AUTO else computes
        return LoadModel(self._named(file, name), self.key(file), dtype, mesh, kernel, **fp8, **settings)

    def load_vae(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        dtype: str = AUTO,
        *,
        names: Sequence[str] = (),
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteVAE:
        """A VAE, whole on every rank. `path` is one file or folder, or TAESD's (encoder, decoder); the others as for `load_model`.

        Raises: CheckpointError, ConfigError.
        """
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        files = [vae_folder(_absolute(p)) for p in paths]
        key = self.key(*files)
        dtype = self.vae_dtype() if dtype == AUTO else dtype
        chosen = names or [""] * len(files)
        load = LoadVAE([self._named(p, n) for p, n in zip(files, chosen, strict=True)], key, dtype)
        return RemoteVAE(self, load, self.load(load, on_event, should_cancel))

    def load_control(
        self,
        path: str | os.PathLike[str],
        model: RemoteModel,
        name: str = "",
        *,
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteControl:
        """A ControlNet for a model that is loaded, in its mesh and dtype; `name` as for `load_model`.

        Raises: CheckpointError, UnsupportedError: the file holds none, or one of another family.
        """
        file = _absolute(path)
        return model.load_control(self._named(file, name), self.key(file), on_event, should_cancel=should_cancel)

    def model_dtype(self, path: Path) -> str:
        """What `auto` is for that file on the cards of these ranks."""
        return dtypes.model_dtype(self.status().ranks, from_scratch=is_from_scratch(path))

    def vae_dtype(self) -> str:
        """What `auto` is for a VAE on the cards of these ranks."""
        return dtypes.vae_dtype(self.status().ranks)

    def _named(self, path: Path, name: str) -> str:
        """How the backend finds the file: here by its path, on another machine below that one's model folders."""
        return (name or path.name) if self.spec.address else str(path)

    def key(self, *paths: Path) -> str:
        """With it begins the name of all that the backend has loaded from these files. Raises: CheckpointError."""
        return "-".join(content_key(path, timed=not self.spec.address) for path in paths)

    def unload(self, models: Sequence[str] = ()) -> None:
        """Free these models of the backend; all where none is named. One that has ended holds none."""
        with contextlib.suppress(BackendLostError, StartError):
            self.request(Unload(list(models)))

    def stop(self, seconds: float = 30.0) -> None:
        """Ends the backend's processes and waits until they are gone; ranks that no longer answer are killed.

        Raises: StartError: they still run after `seconds` and all that.
        """
        with contextlib.suppress(BackendLostError, StartError):
            self.request(Stop())
        self.close()
        if not self.spec.address and not files.wait_until_gone(self.record.agent_pid, seconds):
            kill(self.spec.name, self.record.agent_pid)


def _absolute(path: str | os.PathLike[str]) -> Path:
    """Links are kept: what one leads to, in a hub's cache, has a hash in place of a name."""
    return Path(os.path.abspath(path))
