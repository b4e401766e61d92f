"""Latents as tokens, and which of them each rank has.

Shapes: B rows, C latent channels, Y X latent cells, L tokens, P values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..distributed.collectives import split_range, split_sizes
from ..distributed.mesh import Mesh
from ..errors import InputError

TEXT = 0  # the segment of text tokens; the image's patches are segments 1, 2, ...


@dataclass(frozen=True)
class Tokens:
    """Which tokens an evaluation has, and how they are spread over the sequence-parallel ranks.

    A segment is what flows through a pipeline together: the text, and each patch of the image. Without a pipeline the
    image is one patch.

    Args:
        segments: tokens of each segment by rank, of all segments of the job.
        present: the segments of this evaluation.
        image: of each patch present, the image tokens (first, one past last) of this rank.
        text: the same of the text.
    """

    segments: tuple[tuple[int, ...], ...]
    present: tuple[int, ...]
    image: tuple[tuple[int, int], ...]
    text: tuple[int, int]

    @classmethod
    def spread(cls, patches: Sequence[tuple[int, int]], text_tokens: int, mesh: Mesh) -> Tokens:
        """All segments. `patches`: first and one-past-last image token of each."""
        degree, rank = mesh.sp_degree, mesh.sp_rank
        text = _text_counts(text_tokens, mesh)
        images = [split_sizes(stop - first, degree) for first, stop in patches]
        ranges = [split_range(stop - first, degree, rank) for first, stop in patches]
        own = tuple((first + a, first + b) for (first, _), (a, b) in zip(patches, ranges, strict=True))
        segments = (tuple(text), *map(tuple, images))
        return cls(segments, tuple(range(len(segments))), own, own_text(text_tokens, mesh))

    def of_patch(self, patch: int) -> Tokens:
        """Those that flow with one patch; the text flows with the first."""
        first = patch == 0
        present = (TEXT, 1) if first else (patch + 1,)
        return Tokens(self.segments, present, (self.image[patch],), self.text if first else (0, 0))

    @property
    def image_segments(self) -> tuple[int, ...]:
        return tuple(segment for segment in self.present if segment != TEXT)

    @property
    def first_image_token(self) -> int:
        return sum(sum(self.segments[segment]) for segment in range(1, self.image_segments[0]))

    def counts(self, segments: Sequence[int]) -> list[int]:
        """Tokens of these segments by rank."""
        return [sum(of_rank) for of_rank in zip(*(self.segments[s] for s in segments), strict=True)]

    def take_image(self, x_BLX: Tensor, first: int = 0) -> Tensor:
        """This rank's image tokens of `x`, which begins with image token `first`."""
        parts = [x_BLX[:, start - first : stop - first] for start, stop in self.image]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def in_order(self, gathered_BLX: Tensor) -> Tensor:
        """Image tokens of all ranks, one rank after the other, in the order of the image."""
        patches = self.image_segments
        if len(patches) == 1:
            return gathered_BLX
        degree = len(self.segments[TEXT])
        parts = gathered_BLX.split([self.segments[s][rank] for rank in range(degree) for s in patches], dim=1)
        return torch.cat([part for i in range(len(patches)) for part in parts[i :: len(patches)]], dim=1)


def own_text(text_tokens: int, mesh: Mesh) -> tuple[int, int]:
    """First and one-past-last text token of this rank."""
    counts, rank = _text_counts(text_tokens, mesh), mesh.sp_rank
    start = sum(counts[:rank])
    return start, start + counts[rank]


def _text_counts(text_tokens: int, mesh: Mesh) -> list[int]:
    """The rank that gets one image token less gets the odd text token: loads differ by one at most."""
    return split_sizes(text_tokens, mesh.sp_degree)[::-1]


class TokenSizes(Protocol):
    """What a model says of the latents that it takes. `pos_embed_size`: the most patches along a side."""

    @property
    def patch_size(self) -> int: ...
    @property
    def pos_embed_size(self) -> int: ...


def patch_rows(rows: int, num_patches: int) -> list[tuple[int, int]]:
    """First and one-past-last row of tokens of each patch of an image."""
    return [split_range(rows, num_patches, patch) for patch in range(num_patches)]


def tokens_for(
    config: TokenSizes, mesh: Mesh, height: int, width: int, text_tokens: int, num_patches: int = 1
) -> Tokens:
    """How a latent of height x width cells and a prompt are spread; sides that don't divide count with their padding.

    Raises: InputError: the latent is too large, or has fewer rows of tokens than patches.
    """
    limit, patch = config.pos_embed_size, config.patch_size
    rows, columns = (-(-side // patch) for side in (height, width))
    if rows > limit or columns > limit:
        raise InputError(
            f"{width * 8}x{height * 8} pixels is larger than this model's position table.",
            f"Use sides of at most {limit * patch * 8} pixels.",
        )
    if num_patches > rows:
        raise InputError(
            f"{rows} rows of image tokens can't be cut in {num_patches} patches.",
            "Use a larger image, or fewer patches.",
        )
    if text_tokens < 1:
        raise InputError("The conditioning has no text tokens.", "Give a prompt, if an empty one.")
    return Tokens.spread([(a * columns, b * columns) for a, b in patch_rows(rows, num_patches)], text_tokens, mesh)


def padded(x_BCYX: Tensor, patch: int, below: Tensor | None = None) -> Tensor:
    """Sides that are multiples of `patch`: the latent goes on with its first columns and rows, as ComfyUI pads it.

    Args:
        below: (B, C, Y, X) whose first rows come below; None is `x` itself.
    """
    _, _, Y, X = x_BCYX.shape
    down, right = -Y % patch, -X % patch
    x = torch.cat([x_BCYX, (x_BCYX if below is None else below)[:, :, :down]], dim=2) if down else x_BCYX
    return torch.cat([x, x[..., :right]], dim=3) if right else x


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """(B, L, C * patch * patch), in the order of a convolution's weights."""
    B, C, Y, X = x_BCYX.shape
    x = x_BCYX.view(B, C, Y // patch, patch, X // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (Y // patch) * (X // patch), C * patch * patch)
