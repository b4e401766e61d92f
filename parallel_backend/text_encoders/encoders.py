"""Prompts as SD3 and SDXL take them, as diffusers' pipelines make them of the same encoders. B prompts, L tokens, E wide."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, OutOfMemoryError, UnsupportedError
from .files import NAMES, EncoderFile, Kind
from .loading import load
from .tokenizers import tokenizer_of

log = logging.getLogger("parallel_backend")
# Of SD3's T5, and of the zeros in its place; a CLIP takes as many as it has positions.
T5_TOKENS = 256
Family = Literal["SD3", "SDXL"]
_NEEDED: tuple[Kind, ...] = ("clip_l", "clip_g")


@dataclass
class CheckpointEncoders:
    """The encoders of some files, read when the first prompt comes and kept in the CPU's memory from then on.

    Args:
        context_width: of the model, for SD3 without T5.
        zeros_for_none: no prompt is zeros, as SDXL's base was trained, not an empty text.
        tokenizers: folders to look for them before all others.
    Raises: CheckpointError, UnsupportedError: these files are not what the family takes.
    """

    family: Family
    files: Mapping[Kind, EncoderFile]
    context_width: int
    zeros_for_none: bool = False
    tokenizers: Sequence[Path] = ()
    default_size: int | None = None
    _loaded: dict[tuple[Kind, torch.dtype], tuple[nn.Module, Any]] = field(default_factory=dict)
    _last: tuple[tuple[str | None, ...], torch.dtype, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        there = ", ".join(f"{NAMES[kind]} ({file.path.name})" for kind, file in self.files.items()) or "none"
        if missing := [NAMES[kind] for kind in _NEEDED if kind not in self.files]:
            raise CheckpointError(
                f"{self.family} needs the text encoder {' and '.join(missing)}; found: {there}.",
                "Give load_model text_encoders=[...] with its .safetensors file or folder.",
            )
        if self.family == "SDXL" and "t5" in self.files:
            raise UnsupportedError(f"SDXL takes no T5; found: {there}.", "Leave it out of text_encoders.")

    def encode(self, prompts: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `TextEncoders.encode`; the last result is kept. Raises: CheckpointError, ConfigError: as `load`; OutOfMemoryError."""
        if self._last is None or self._last[:2] != (tuple(prompts), dtype):
            self._last = tuple(prompts), dtype, self._encode(prompts, device, dtype)
        return self._last[2]

    def _encode(self, prompts: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        texts = [prompt or "" for prompt in prompts]
        (context_l, pooled_l), (context_g, pooled_g) = (self._clip(kind, texts, device, dtype) for kind in _NEEDED)
        context = torch.cat([context_l, context_g], dim=-1)
        if self.family == "SD3":
            t5_BLE = self._t5(texts, device, dtype)
            context = nn.functional.pad(context, (0, t5_BLE.shape[-1] - context.shape[-1]))
            return torch.cat([context, t5_BLE], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)
        if self.zeros_for_none:
            given = torch.tensor([prompt is not None for prompt in prompts]).to(dtype)
            return context * given.view(-1, 1, 1), pooled_g * given.view(-1, 1)
        return context, pooled_g

    def _clip(self, kind: Kind, texts: list[str], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The last but one layer, (B, 77, E), and the pooled text through the projection, (B, A)."""
        with self._on(kind, device, dtype) as (model, tokenizer):
            ids = _tokens(tokenizer, texts, model.config.max_position_embeddings, NAMES[kind])
            out = model(ids.to(device), output_hidden_states=True)
            return out.hidden_states[-2].cpu(), out.text_embeds.cpu()

    def _t5(self, texts: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, 256, E): zeros where there is no T5, as diffusers has it."""
        if "t5" not in self.files:
            return torch.zeros(len(texts), T5_TOKENS, self.context_width, dtype=dtype)
        with self._on("t5", device, dtype) as (model, tokenizer):
            ids = _tokens(tokenizer, texts, T5_TOKENS, NAMES["t5"])
            return model(ids.to(device))[0].to(dtype).cpu()

    @contextmanager
    def _on(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
        """An encoder, on that device for so long, and its tokenizer."""
        if (kind, dtype) not in self._loaded:
            file = self.files[kind]
            tokenizer = tokenizer_of(file, self.tokenizers)  # before the weights: it may be missing
            self._loaded[kind, dtype] = load(file, dtype), tokenizer
        model, tokenizer = self._loaded[kind, dtype]
        try:
            with torch.no_grad():
                yield model.to(device), tokenizer
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"{NAMES[kind]} found no room on {device} beside the model.",
                "Leave T5 out of text_encoders, hold the model in fp8, or spread it over more ranks.",
            ) from None
        finally:
            model.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _tokens(tokenizer: Any, texts: list[str], length: int, name: str) -> Tensor:
    """(B, length) numbers, filled up; what is cut off is told."""
    whole = tokenizer(texts, verbose=False).input_ids
    for text, ids in zip(texts, whole, strict=True):
        if len(ids) > length:
            log.warning("%s reads %d of the %d tokens of %.60r.", name, length, len(ids), text)
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
