"""Which ranks do what: the axes of a mesh, their degrees and their order. It travels as it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Literal

import msgspec

from ..errors import ConfigError

AXES = ("dp", "cfg", "pp", "patch", "ring", "ulysses", "tp")
# Which axes the two kinds of model know, and which of them takes the ranks that nothing else was said of.
MMDIT_AXES, MMDIT_REST = ("dp", "cfg", "pp", "ring", "ulysses", "tp"), "ulysses"
UNET_AXES, UNET_REST = ("dp", "cfg", "patch"), "patch"


class MeshSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the ranks of a backend share one model: a degree for each axis, outermost axis first.

    `order` is the nesting of the axes in rank numbers, outermost first; ranks of the innermost axis are
    neighbours. It matters only for which links an axis uses, never for the result. `sliced`: of a UNet's weights each rank
    of cfg and patch holds a slice, and gathers a block's when it needs them.
    """

    dp: int = 1
    cfg: int = 1
    pp: int = 1
    patch: int = 1
    ring: int = 1
    ulysses: int = 1
    tp: int = 1
    order: tuple[str, ...] = AXES
    sliced: bool = False

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ConfigError(f"{axis}={degree!r} is not a degree.", "Give a whole number of 1 or more.")
        if self.cfg > 2:
            raise ConfigError(
                f"cfg={self.cfg} is not possible: guidance has two branches, cond and uncond.", "Use cfg=1 or cfg=2."
            )
        if sorted(self.order) != sorted(AXES):
            raise ConfigError(f"order={self.order} does not name each axis once.", f"Use an order of {AXES}.")

    @property
    def degrees(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def axes(self) -> dict[str, int]:
        """Those of more than one rank, outermost first."""
        return {axis: getattr(self, axis) for axis in self.order if getattr(self, axis) > 1}

    @property
    def world_size(self) -> int:
        return prod(self.degrees.values())

    def check_world(self, world_size: int) -> None:
        """Raises ConfigError unless dp*cfg*pp*patch*ring*ulysses*tp == world_size."""
        if self.world_size != world_size:
            terms = " * ".join(f"{axis}={degree}" for axis, degree in self.degrees.items())
            raise ConfigError(
                f"{terms} = {self.world_size}, but the backend has {world_size} ranks.",
                f"Choose degrees whose product is {world_size}, or a backend of {self.world_size} ranks.",
            )

    def coordinates(self, rank: int) -> dict[str, int]:
        """The position of `rank` on every axis."""
        position = {}
        for axis in reversed(self.order):
            rank, position[axis] = divmod(rank, getattr(self, axis))
        return position

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that talk to each other along an axis, or several, one list per group, each in axis order."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self.coordinates(rank)
            found.setdefault(tuple(position[a] for a in AXES if a not in axes), []).append(rank)
        return sorted(found.values())

    def describe(self) -> str:
        named = [f"{axis}={degree}" for axis, degree in self.degrees.items() if degree > 1]
        return " ".join([*named, *(["sliced"] if self.sliced else [])]) or "one rank"

    @classmethod
    def from_axes(
        cls,
        cfg: tuple[int, int],
        sp: tuple[int, int],
        tp: tuple[int, int],
        *,
        mesh_shape: tuple[int, int],
        sp_method: Literal["ring", "ulysses"] = "ring",
    ) -> MeshSpec:
        """The form `((cfg_factor, cfg_axis), (sp_factor, sp_axis), (tp_factor, tp_axis))` on a named mesh shape.

        Ranks are numbered along the rows of `mesh_shape`. Where factors share a mesh axis, cfg is outermost and
        tp innermost. Source: the parallel config of tt-metal's SD3.5 Large.
        """
        if sp_method not in ("ring", "ulysses"):
            raise ConfigError(f"sp_method {sp_method!r} is not known.", "Use 'ring' or 'ulysses'.")
        parts = {"cfg": cfg, sp_method: sp, "tp": tp}
        for name, (_, mesh_axis) in parts.items():
            if mesh_axis not in (0, 1):
                raise ConfigError(
                    f"{name} is put on axis {mesh_axis} of a {mesh_shape[0]}x{mesh_shape[1]} mesh.",
                    "Use axis 0 (rows) or 1 (columns).",
                )
        for mesh_axis, size in enumerate(mesh_shape):
            factors = {name: factor for name, (factor, at) in parts.items() if at == mesh_axis}
            if prod(factors.values()) != size:
                terms = " * ".join(f"{n}={f}" for n, f in factors.items()) or "no factor"
                raise ConfigError(
                    f"{terms} does not fill axis {mesh_axis} of the {mesh_shape[0]}x{mesh_shape[1]} mesh, which has {size}.",
                    "The factors on a mesh axis multiply to its size.",
                )
        nesting = [name for mesh_axis in (0, 1) for name, (_, at) in parts.items() if at == mesh_axis]
        order = tuple([axis for axis in AXES if axis not in nesting] + nesting)
        return cls(order=order, **{name: factor for name, (factor, _) in parts.items()})  # type: ignore[arg-type]

    def check_axes(self, axes: Sequence[str], what: str) -> None:
        """Raises ConfigError where a degree above 1 is of an axis that the model has no use for, or slices are."""
        if self.sliced and axes != UNET_AXES:
            raise ConfigError(
                f"sliced is for UNets; {what} spreads its weights otherwise.", "Use tp or pp in its place."
            )
        for axis, degree in self.degrees.items():
            if degree > 1 and axis not in axes:
                raise ConfigError(
                    f"{axis}={degree} can't be used on {what}: its axes are {', '.join(axes)}.",
                    f"Set {axis} to 1, and raise one of these in its place.",
                )

    @classmethod
    def filled(cls, world_size: int, rest: str = MMDIT_REST, *, sliced: bool = False, **degrees: int) -> MeshSpec:
        """The mesh of these degrees, where 0 leaves one open: cfg is 2 where that fits, `rest` takes what is left, dp is 1.

        Raises: ConfigError: the degrees don't fit `world_size` ranks.
        """
        given = {axis: degree for axis, degree in degrees.items() if degree}
        left = world_size // max(1, prod(given.values()))
        if degrees.get("cfg") == 0:
            given["cfg"] = 2 if left and left % 2 == 0 else 1
            left //= given["cfg"]
        if rest not in given:
            given[rest] = max(1, left)
        mesh = cls(sliced=sliced, **given)  # type: ignore[arg-type]
        mesh.check_world(world_size)
        return mesh

    @classmethod
    def exact_default(cls, world_size: int, rest: str = MMDIT_REST) -> MeshSpec:
        """cfg 2 where it fits, the rest ulysses, or bands for a UNet: what mesh_choice takes where it has no figures."""
        return cls.filled(world_size, rest, cfg=0)

    @classmethod
    def all_of(cls, world_size: int, axes: Sequence[str] = MMDIT_AXES) -> list[MeshSpec]:
        """Every mesh of `world_size` ranks on `axes`, in a fixed order; tests and benchmarks go through it."""
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        combos = (dict(zip(axes, degrees, strict=True)) for degrees in product(divisors, repeat=len(axes)))
        return [cls(**c) for c in combos if prod(c.values()) == world_size and c["cfg"] <= 2]  # type: ignore[arg-type]
