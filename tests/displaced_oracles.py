"""Displaced steps played by one process: what ranks in a pipeline or a ring are to give."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from local_network import CPU, evaluated, local_network
from served import NEGATIVE, POSITIVE
from torch import Tensor

from parallel_backend import Conditioning, MeshSpec
from parallel_backend.config import SamplerSpec
from parallel_backend.distributed.attention import Joined, StaleKV
from parallel_backend.distributed.collectives import split_sizes
from parallel_backend.distributed.mesh import Mesh, build_mesh
from parallel_backend.distributed.stale import Kept, Step
from parallel_backend.models.families import SD3
from parallel_backend.models.network import TokenNetwork
from parallel_backend.models.prediction import timesteps_of
from parallel_backend.models.tokens import patch_rows
from parallel_backend.models.transformer import Attend
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Flow

SETTINGS: dict[str, Any] = {"seed": 3, "steps": 4, "cfg_scale": 4.0, "sampler": "euler_ancestral"}


class OneAfterTheOther:
    """A pipeline of one stage, in this process: each patch is through before the next enters. The oracle of all."""

    def __init__(
        self, network: TokenNetwork, prompts: Sequence[Conditioning], latent: Tensor, first: int, patches: int
    ):
        self.network, self.prompts, self.first_step = network, prompts, first
        self.kept = Kept(token_kv={}, num_patches=patches)
        self.shape = latent.shape
        self.rows = [slice(2 * a, 2 * b) for a, b in patch_rows(latent.shape[2] // 2, patches)]
        self.runs_samplers, self._out = True, deque[list[Tensor]]()

    def outputs(self, x: Tensor, timestep: Tensor, index: int, sigma: Tensor) -> list[Tensor]:
        steps = [Step(index, "sync", branch, self.kept) for branch in range(len(self.prompts))]
        times = timesteps_of(timestep, x.shape[0], x.device)
        return [
            evaluated(self.network, x, times, *prompt, step) for prompt, step in zip(self._rows(x), steps, strict=True)
        ]

    def begin(self, timestep: Tensor) -> None:
        self._timestep = timestep

    def submit(self, patch: int, x: Tensor) -> None:
        out, model, times = [], self.network.model, timesteps_of(self._timestep, x.shape[0], x.device)
        for branch, (context, pooled) in enumerate(self._rows(x)):
            tokens = model.tokens_for(self.shape[2], self.shape[3], context.shape[1], len(self.rows)).of_patch(patch)
            attend = Attend(model.attention, tokens, Step(0, "displaced", branch, self.kept))
            prepared = self.network.prepare(context, pooled)
            vectors = model.vectors(times, prepared.tensors["pooled"])
            out.append(model.stage(x, prepared, self.network.places(self.shape, tokens), vectors, attend, None))
        self._out.append(out)

    def collect(self, patch: int) -> list[Tensor]:
        return self._out.popleft()

    def follow(self, timesteps: Sequence[Tensor]) -> None:
        raise AssertionError("there is no other stage")

    def finish(self, x: Tensor) -> Tensor:
        return x

    def _rows(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(p.context.expand(len(x), -1, -1), p.pooled.expand(len(x), -1)) for p in self.prompts]


@cache
def played_by_one(path: Path, shape: tuple[int, ...], warmup: int, patches: int) -> Tensor:
    """What a pipeline of any mesh is to give, from an empty latent."""
    return one_process(path, torch.zeros(shape), warmup, patches)


@torch.inference_mode()
def one_process(
    path: Path, latent: Tensor, warmup: int, patches: int, device: torch.device = CPU, **changes: Any
) -> Tensor:
    settings = SETTINGS | changes
    mask = settings.pop("noise_mask", None)
    network = local_network(path, build_mesh(MeshSpec()), device)
    assert isinstance(network, TokenNetwork)
    given = [POSITIVE] if settings["cfg_scale"] == 1.0 else [POSITIVE, NEGATIVE]
    prompts = [Conditioning(prompt.context.to(device), prompt.pooled.to(device)) for prompt in given]
    oracle = OneAfterTheOther(network, prompts, latent, warmup, patches)
    out = sample_latent(
        oracle.outputs,
        SamplerSpec(**settings),
        Flow(3.0),
        latent=(latent - SD3.shift) * SD3.scale if latent.any() else latent,
        mask=mask,
        pipeline=oracle,
    )
    return out / SD3.scale + SD3.shift


class AllRingRanks:
    """Attention of every ring rank, in one process: its own keys fresh, the others' as they were an evaluation ago."""

    def __init__(self, mesh: Mesh, ring: int, ulysses: int) -> None:
        self.mesh, self.degree, self.ulysses = mesh, ring, ulysses
        self.text = 0
        self._before: dict[Any, list[Tensor]] = {}

    def __call__(self, joined: Joined, counts: Sequence[int], memory: StaleKV) -> tuple[Tensor, Tensor]:
        total, (rows, heads, head_dim), (kind, *_) = sum(joined.lengths), joined.sizes, memory.slot
        place = (memory.exchange.branch, memory.slot)  # type: ignore[attr-defined]
        q, k, v = joined.sent.view(total, rows, 3, heads, head_dim).permute(2, 1, 0, 3, 4)
        text = 0 if kind == "image" else self.text
        own = self._owners(text, total - text)
        fresh = [torch.stack([k, v])[:, :, own == rank] for rank in range(self.degree)]
        before = self._before.get(place, fresh) if memory.phase == "displaced" else fresh
        out = torch.empty_like(q)
        for rank in range(self.degree):
            keys = torch.cat([fresh[r] if r == rank else before[r] for r in range(self.degree)], dim=2)
            given = [t.transpose(1, 2) for t in (q[:, own == rank], keys[0], keys[1])]
            out[:, own == rank] = torch.nn.functional.scaled_dot_product_attention(*given).transpose(1, 2)
        self._before[place] = fresh
        one, two = out.flatten(2).split(list(joined.lengths), dim=1)
        return one, two

    def _owners(self, text: int, image: int) -> Tensor:
        """The ring rank of each token; a ring rank is several where there is ulysses in it."""
        of_text = reversed(split_sizes(text, self.degree * self.ulysses))
        of_image = split_sizes(image, self.degree * self.ulysses)
        owners = [
            rank // self.ulysses for counts in (of_text, of_image) for rank, n in enumerate(counts) for _ in range(n)
        ]
        return torch.tensor(owners)


@torch.inference_mode()
def one_process_of_a_ring(path: Path, latent: Tensor, warmup: int, ring: int, ulysses: int = 1) -> Tensor:
    network = local_network(path, build_mesh(MeshSpec()))
    assert isinstance(network, TokenNetwork)
    attention = AllRingRanks(network.model.mesh, ring, ulysses)
    network.model.attention = attention  # type: ignore[assignment]
    kept = Kept(stale=_NoExchange())  # type: ignore[arg-type]

    def outputs(x: Tensor, timestep: Tensor, index: int, sigma: Tensor) -> list[Tensor]:
        out = []
        for branch, prompt in enumerate((POSITIVE, NEGATIVE)):
            attention.text = prompt.context.shape[1]
            step = Step(index, "sync" if index < warmup else "displaced", branch, kept)
            context, pooled = prompt.context.expand(len(x), -1, -1), prompt.pooled.expand(len(x), -1)
            out.append(evaluated(network, x, timestep.expand(len(x)), context, pooled, step))
        return out

    out = sample_latent(
        outputs,
        SamplerSpec(**SETTINGS),
        Flow(3.0),
        latent=latent,
    )
    return out / SD3.scale + SD3.shift


class _NoExchange:
    def __init__(self, branch: object = None) -> None:
        self.branch = branch

    def of(self, branch: object) -> _NoExchange:
        return _NoExchange(branch)

    def end_evaluation(self) -> None:
        """Nothing is under way."""
