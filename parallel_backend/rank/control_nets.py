"""ControlNets that ranks hold beside the models that they are for, and where jobs use them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from weakref import ref

import torch
from torch import Tensor, nn

from ..distributed.kernel_trial import choose_kernel
from ..distributed.kernels import Use
from ..errors import InputError, UnknownModelError, UnsupportedError
from ..models.checkpoint import bytes_held, load_parameters
from ..models.control_use import ControlNetwork, ControlUse
from ..models.controls import OpenedControl, open_control
from ..models.left_over import left_over_note
from ..models.prediction import Predictor
from ..models.vae import BandVAE
from ..rpc import messages
from ..rpc.messages import LoadControl
from ..rpc.state import ModelState
from .allowed_files import AllowedFiles
from .jobs import Job
from .meter import Meter
from .residents import Resident, Residents

# Of prompts that take turns, and of what others share.
KEPT_HINTS = 8


@dataclass(frozen=True)
class _Hint:
    """As the network prepared it, as long as what it was made of is kept."""

    given: ref[Tensor]
    prepared: Tensor


class ControlNets:
    """Those among a rank's residents; each leaves with its model.

    Args:
        beat: called at every block.
    """

    def __init__(self, residents: Residents, files: AllowedFiles, beat: Callable[[], object]) -> None:
        self._residents, self._files, self._beat = residents, files, beat
        self._hints: OrderedDict[tuple[object, ...], _Hint] = OrderedDict()

    def load(self, body: LoadControl, base: Predictor, job: Job) -> tuple[list[str], int, list[str]]:
        """It is held. Returns: the models that left for it, bytes read, and what the user should know.

        Raises: CheckpointError, UnsupportedError, ConfigError, OutOfMemoryError: on every rank alike.
        """
        mesh, dtype, device = base.mesh, base.dtype, base.device

        def build() -> tuple[OpenedControl, nn.Module, str, int, list[str]]:
            weights = self._residents[body.model].weights
            assert weights is not None
            opened = open_control(self._files.checked(body.path, body.key), base.network, weights.source)
            config = base.network.config
            heads = -(-config.heads // (mesh.tp.degree * mesh.ulysses.degree))
            kernel, note = choose_kernel(body.kernel, Use(device, dtype, mesh.ring.degree > 1, heads, config.head_dim))
            with torch.device("meta"):
                module = opened.build(mesh, kernel)
            wanted = {*dict(module.named_parameters()), *opened.unread}
            left = left_over_note(wanted, opened.source.names(), opened.source.path.name)
            return opened, module, kernel, bytes_held(module, opened.source, dtype), [note, left]

        opened, module, kernel, needed, notes = job.control.agreed(build)
        path = opened.source.path
        evicted = self._residents.make_room(needed, path.name, "controlnet", mesh.spec, job.control, beside=body.model)

        def read() -> ControlNetwork:
            load_parameters(
                module,
                opened.source,
                device=device,
                dtype=dtype,
                unread=opened.unread,
                should_stop=job.given_up,
                told=meter.add,
            )
            for block in filter(lambda part: isinstance(part, opened.repeated), module.modules()):
                block.register_forward_pre_hook(lambda *_: self._tell_block())
            return opened.network(module, mesh, kernel, device, dtype)

        meter = Meter(job, f"loading {path.name}", "bytes", needed)
        network = job.control.agreed(read)
        meter.finish()
        name = body.held_as
        held_in, spec = str(dtype).split(".")[-1], mesh.spec
        state = ModelState(name, path.name, "controlnet", spec.describe(), held_in, needed, spec.axes)
        self._residents[name] = Resident(network, state, 0, base=body.model, is_of_weights=opened.is_of_weights)
        return evicted, opened.source.bytes_read, notes

    def _tell_block(self) -> None:
        """A hook: what it returned would be taken for the block's inputs."""
        self._beat()

    def uses(
        self,
        asked: Sequence[messages.ControlUse],
        tensors: Sequence[Tensor],
        predictor: Predictor,
        x: Tensor,
        known: dict[messages.ControlUse, ControlUse],
        *,
        is_patched: bool,
    ) -> tuple[ControlUse, ...]:
        """Of a prompt of latents `x`, ready to be evaluated; one that two prompts share is one.

        Args:
            known: of this job, added to.
            is_patched: patches lie on the model's weights.
        Raises: UnknownModelError: one isn't held (any more). InputError, UnsupportedError: it doesn't fit the latents.
        """
        if len(set(asked)) < len(asked):
            raise InputError("A ControlNet is named twice with one hint and strength.", "Name it once, with their sum.")
        for use in asked:
            if is_patched and use.net in self._residents and self._residents[use.net].is_of_weights:
                raise UnsupportedError(
                    f"{self._residents[use.net].state.name} is made of the model's weights, on which patches lie now.",
                    "Remove the LoRA, or the Control-LoRA, or use a whole ControlNet.",
                )
            if use not in known:
                known[use] = self._use(use, tensors, predictor, x, len(known))
        return tuple(known[use] for use in asked)

    def _use(
        self, use: messages.ControlUse, tensors: Sequence[Tensor], predictor: Predictor, x: Tensor, number: int
    ) -> ControlUse:
        if use.net not in self._residents:
            raise UnknownModelError(f"The backend does not hold {use.net!r} (any more).", "Load it again.")
        resident = self._residents[use.net]
        if not resident.base or self._residents[resident.base].model is not predictor:
            raise InputError(
                f"{use.net!r} is no ControlNet of this model.", "Load it for the model that it is used with."
            )
        self._residents.move_to_end(use.net)
        hint, network = tensors[use.hint], resident.model
        assert not isinstance(network, (Predictor, BandVAE))
        if hint.ndim != 4 or hint.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"A ControlNet's hint of shape {list(hint.shape)} came for {x.shape[0]} latents.",
                f"Give (rows, channels, height, width) of 1 row, or of {x.shape[0]}.",
            )
        start, end = inf if use.start is None else use.start, 0.0 if use.end is None else use.end
        prepared = self._prepared(use, hint, network, predictor)
        network.check(prepared, use.types, x.shape)
        return ControlUse(network, prepared, use.strength, start, end, use.types, number)

    def _is_used(self, key: tuple[object, ...], kept: _Hint) -> bool:
        return kept.given() is not None and key[1] in self._residents

    def forget(self) -> None:
        """Hints of ControlNets that have left."""
        self._hints.clear()

    def _prepared(
        self, use: messages.ControlUse, hint: Tensor, network: ControlNetwork, predictor: Predictor
    ) -> Tensor:
        """Once for a hint that is kept: a sampling step by step asks with it at every evaluation."""
        self._hints = OrderedDict((key, kept) for key, kept in self._hints.items() if self._is_used(key, kept))
        key = (id(hint), use.net)
        found = self._hints.pop(key, None)
        if found is None or found.given() is not hint:
            found = _Hint(ref(hint), network.prepare(hint.to(predictor.device, predictor.dtype)))
        self._hints[key] = found
        while len(self._hints) > KEPT_HINTS:
            self._hints.popitem(last=False)
        return found.prepared
