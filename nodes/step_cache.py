"""ParallelStepCache: asks on a MODEL that evaluations take from earlier ones what is nearly the same."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..parallel_backend.config import STEP_CACHES, StepCache
from .family import not_parallel
from .hung.step_cache import with_step_cache
from .known_to_core import search_aliases
from .remote_model import RemotePatcher

_USUAL = StepCache()


class ParallelStepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParallelStepCache",
            display_name="Step Cache (Parallel)",
            category="parallel",
            description="Steps that differ little from the one before take most of their work from it: faster, and not exact. "
            "For any sampler whose whole loop runs in the backend.",
            **search_aliases("first block cache", "fbcache", "teacache", "deepcache"),
            inputs=[
                io.Model.Input("model", tooltip="A parallel MODEL."),
                io.Combo.Input(
                    "method",
                    options=list(STEP_CACHES),
                    default=_USUAL.method,
                    tooltip="auto: first_block for SD3.x, deepcache for SDXL. SD3.x: first_block computes the first block and looks at what "
                    "it adds; teacache looks at its input alone. SDXL: deepcache computes the outermost blocks alone in all but one "
                    "of interval evaluations.",
                ),
                io.Float.Input(
                    "threshold",
                    default=_USUAL.threshold,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="first_block and teacache: the relative change below which a step is reused. More: faster, and further "
                    "from exact. 0: none is.",
                ),
                io.Int.Input(
                    "interval",
                    default=_USUAL.interval,
                    min=1,
                    max=100,
                    tooltip="deepcache: one of so many evaluations is computed whole (most samplers make one a step). 1: each is.",
                ),
                io.Int.Input(
                    "first_steps",
                    default=_USUAL.first_steps,
                    min=0,
                    max=10000,
                    tooltip="Steps at the start that are computed in any case: they set the layout.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=_USUAL.last_steps,
                    min=0,
                    max=10000,
                    tooltip="Steps at the end that are computed in any case: they set the details.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The MODEL that asks for the step cache.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, method: str, threshold: float, interval: int, first_steps: int, last_steps: int
    ) -> io.NodeOutput:
        """Raises: UnsupportedError: not a parallel MODEL."""
        if not isinstance(model, RemotePatcher):
            raise not_parallel("Step Cache", model, "leave this node out of its wire.")
        return io.NodeOutput(with_step_cache(model, StepCache(method, threshold, interval, first_steps, last_steps)))
