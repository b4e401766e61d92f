"""PipeFusion: patches of the image flow through the stages of pp, each stage at work on another one.

Each patch attends to fresh keys and values of itself and of the patches before it, and to those that the others had a
step ago; the text flows with the first patch. The first stage runs the samplers: patches of the next step enter while the
last ones of this step are still on their way.
Source: Fang et al. 2024 (arXiv 2405.14430).
Shapes: B rows of this rank's share, C latent channels, Y X latent cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import Handle, broadcast, first_says, start_receive, start_send
from ..distributed.stale import Kept, Step
from ..errors import CancelledError
from .network import TokenNetwork
from .prediction import Predictor
from .share import Share
from .tokens import padded, patch_rows
from .transformer import Attend

# Receives that are posted before their turn, so that what is sent travels while this stage computes.
AHEAD = 2


class Pipeline:
    """The displaced steps of one job, as one rank sees them. Ranks of all stages call the same steps.

    Args:
        share: of the job.
        shape: (B, C, Y, X) of the whole latent, all rows.
        kept: of a job whose exact steps have filled it.
        first_step: the first displaced step.
        cancelled: whether the client gave the job up; only rank 0 is asked.
    """

    def __init__(
        self,
        predictor: Predictor,
        share: Share,
        shape: Sequence[int],
        kept: Kept,
        first_step: int,
        cancelled: Callable[[], bool],
    ) -> None:
        """Raises: InputError: the image has too few rows for its patches."""
        assert isinstance(predictor.network, TokenNetwork)
        self.network, self.mesh, self.device = predictor.network, predictor.mesh, predictor.device
        self.first_step, self.cancelled, self.dtype = first_step, cancelled, predictor.dtype
        self.share = share
        self.tokens = [
            self.network.model.tokens_for(shape[2], shape[3], call.own.context.shape[1], kept.num_patches)
            for call in share.calls
        ]
        patch = self.network.config.patch_size
        cuts = patch_rows(-(-shape[2] // patch), kept.num_patches)
        self.rows = [slice(a * patch, min(b * patch, shape[2])) for a, b in cuts]
        self._columns, self._first_rows = shape[3], torch.empty(0)
        self._step = Step(first_step, "displaced", kept=kept)
        own_rows = share.calls[0].own.pooled.shape[0]
        self._calls = range(len(share.calls)) if own_rows else range(0)  # dp can leave a rank without rows
        width = -(-shape[3] // patch) * patch
        self._shapes = [(own_rows, shape[1], (b - a) * patch, width) for a, b in cuts]
        self._whole = (own_rows, shape[1], cuts[-1][1] * patch, width)
        self._vectors: list[Tensor] = []
        self._due: deque[Handle] = deque()
        self._sent: deque[Handle] = deque()

    @property
    def runs_samplers(self) -> bool:
        """On the first stage; its ranks have the same latents."""
        return self.network.model.is_first

    # -- the first stage ------------------------------------------------------------------------------------------

    def begin(self, timestep: Tensor) -> None:
        """Opens a step for all stages.

        Raises: CancelledError: on every rank, all that was under way taken in.
        Comm: one byte over the first stage, one to the next.
        """
        self._open_step()
        stop = first_says(self.cancelled(), self.mesh.first_stage)
        self._say(stop)
        if stop:
            self._stop()
        self._vectors = self._vectors_at(timestep)

    def submit(self, patch: int, x_BCYX: Tensor) -> None:
        """Sends a patch on its way. `x`: the model's input, all rows of the batch."""
        own = self.share.own_rows(x_BCYX).to(self.dtype)
        if patch == 0:
            self._first_rows = own
        own = padded(own, self.network.config.patch_size, self._first_rows)
        for call in self._calls:
            self._send(self._compute(patch, call, own, None), self.mesh.pp.rank + 1, self.mesh.pp)
            blank = torch.empty(self._shapes[patch], dtype=self.dtype, device=self.device)
            self._due.append(start_receive(blank, self.mesh.pp.degree - 1, self.mesh.way_back))

    def collect(self, patch: int) -> list[Tensor]:
        """The output of the patch submitted first, for each prompt, fp32, all rows.

        Comm: `Share.gather`'s.
        """
        height = self.rows[patch].stop - self.rows[patch].start
        outputs = [self._due.popleft().wait().float()[:, :, :height, : self._columns] for _ in self._calls]
        none = torch.empty(*self._shapes[patch][:2], height, self._columns, device=self.device)
        return self.share.gather(outputs or [none for _ in self.share.calls])

    # -- the others -----------------------------------------------------------------------------------------------

    def follow(self, timesteps: Sequence[Tensor]) -> None:
        """Takes part in the displaced steps, up to the last or to a cancel.

        Raises: CancelledError: on every rank.
        """
        order = list(product(range(len(self.rows)), self._calls))
        for timestep in timesteps:
            self._open_step()
            stop = self._hear()
            if stop:
                self._stop()
            self._vectors = self._vectors_at(timestep)
            for number, (patch, call) in enumerate(order):
                for next_patch, next_call in order[number + len(self._due) : number + AHEAD]:
                    self._due.append(self._start_receive(next_patch, next_call))
                out = self._compute(patch, call, None, self._due.popleft())
                model = self.network.model
                self._send(out, *((0, self.mesh.way_back) if model.is_last else (self.mesh.pp.rank + 1, self.mesh.pp)))

    # -- all ------------------------------------------------------------------------------------------------------

    def finish(self, x: Tensor) -> Tensor:
        """The first stage's latent on every rank.

        Comm: one broadcast over pp.
        """
        self._wait_for_sent(0)
        return broadcast(x, 0, self.mesh.pp)

    def _compute(self, patch: int, call: int, x: Tensor | None, arriving: Handle | None) -> Tensor:
        tokens = self.tokens[call].of_patch(patch)
        step = replace(self._step, branch=call)
        if x is None:
            x = torch.empty(self._shapes[patch], dtype=self.dtype, device="meta")
        places = self.network.places(self._whole, tokens)
        attend = Attend(self.network.model.attention, tokens, step)
        prepared = self.share.calls[call].own
        timeline = self._step.kept.timeline if self._step.kept is not None else None
        with nullcontext() if timeline is None else timeline.span(patch=patch):
            return self.network.model.stage(x, prepared, places, self._vectors[call], attend, arriving)

    def _open_step(self) -> None:
        timeline = self._step.kept.timeline if self._step.kept is not None else None
        if timeline is not None:
            timeline.begin(max(timeline.step + 1, self.first_step))

    def _vectors_at(self, timestep: Tensor) -> list[Tensor]:
        calls = self.share.at(timestep, None)
        return [calls[call].own.tensors["vectors"] for call in self._calls]

    def _start_receive(self, patch: int, call: int) -> Handle:
        tokens, rows = self.tokens[call].of_patch(patch), self._shapes[patch][0]
        return self.network.model.start_receive(rows, tokens, self.dtype, self.device)

    def _send(self, x: Tensor, to: int, axis: Any) -> None:
        self._sent.append(start_send(x, to, axis))
        self._wait_for_sent(AHEAD * len(self.rows) * len(self.share.calls))

    def _wait_for_sent(self, but: int) -> None:
        while len(self._sent) > but:
            self._sent.popleft().wait()

    def _say(self, stop: bool) -> None:
        if not self.network.model.is_last:
            self._send(torch.tensor([stop], dtype=torch.uint8), self.mesh.pp.rank + 1, self.mesh.pp)

    def _hear(self) -> bool:
        stop = bool(start_receive(torch.zeros(1, dtype=torch.uint8), self.mesh.pp.rank - 1, self.mesh.pp).wait())
        self._say(stop)
        return stop

    def _stop(self) -> None:
        while self._due:
            self._due.popleft().wait()
        self._wait_for_sent(0)
        raise CancelledError("The job was cancelled by its client.")
