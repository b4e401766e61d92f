"""The task of a small MMDiT: rectified flow on latents, in SD3.5's layout.

Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1 (logit-normal timesteps).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel_backend.config import MeshSpec
from parallel_backend.demo.captions import embed
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.models.mmdit import MMDiT
from parallel_backend.models.prepared import PreparedPrompt
from parallel_backend.sampling.parameterization import Flow
from parallel_backend.small_checkpoints.mmdit import sine_table, small_config

from .config import TrainSpec
from .data import Batch
from .latents import LatentTask

POSITIONS = 32
FILE = "mmdit.safetensors"


class MMDiTTask(LatentTask):
    def __init__(self, spec: TrainSpec, device: torch.device) -> None:
        super().__init__(spec, device, Flow(), "simple")
        config = small_config("sd3.5-medium", depth=spec.depth, pos_embed_size=POSITIONS)
        self.model = MMDiT(config, build_mesh(MeshSpec()), "native").requires_grad_(True)
        initialise(self.model, spec.seed)
        self.model.to(device)
        self.positions = sine_table(config.hidden, POSITIONS)

    def start_from(self, folder: Path) -> None:
        """Takes the weights of an exported run."""
        tensors = load_file(folder / FILE)
        del tensors["pos_embed"]
        self.model.load_state_dict(tensors)

    def loss(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        """The velocity's squared error at logit-normal times; some prompts are dropped, for guidance."""
        latents, rows = batch.images.to(self.device), batch.images.shape[0]
        sigmas = torch.randn(rows, generator=draws).sigmoid().to(self.device)
        noise = torch.randn(latents.shape, generator=draws).to(self.device)
        dropped = torch.rand(rows, generator=draws) < self.spec.prompt_dropout
        sigmas_B111 = sigmas.view(-1, 1, 1, 1)
        x = sigmas_B111 * noise + (1 - sigmas_B111) * latents
        words = batch.words.masked_fill(dropped[:, None], 0)
        velocity = self.output(model, x, 1000 * sigmas, words, batch.hints)
        return F.mse_loss(velocity.float(), noise - latents)

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """One file in half precision, under the names that SD3.5's files have."""
        tensors = {name: p.detach().half().cpu().contiguous() for name, p in model.named_parameters()}
        path = folder / FILE
        save_file(tensors | {"pos_embed": self.positions.half()}, path, metadata={"format": "pt"})
        return [path]

    def output(self, model: nn.Module, x: Tensor, timesteps: Tensor, words: Tensor, hints: Tensor) -> Tensor:
        context, pooled = (t.to(self.device) for t in embed(words))
        rows, columns = (side // 2 for side in x.shape[2:])
        top, left = (POSITIONS - rows) // 2, (POSITIONS - columns) // 2
        table = self.positions.view(POSITIONS, POSITIONS, -1)
        crop = table[top : top + rows, left : left + columns].reshape(rows * columns, -1)
        return model(x, timesteps, PreparedPrompt(context, pooled, {}), crop.to(self.device))


def initialise(model: MMDiT, seed: int) -> None:
    """Linear layers as in the DiT paper: Xavier, and zero where a block or the output begins as nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            nn.init.ones_(parameter)
        elif name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
