"""DisplacedSteps: asks on a MODEL for displaced steps, whatever samples it."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..parallel_backend.errors import UnsupportedError
from .hung.displaced_steps import USUAL_WARMUP, Displaced, with_displaced
from .known_to_core import search_aliases
from .remote_model import RemotePatcher


def displaced_inputs(*, optional: bool = False) -> list[io.Int.Input]:
    """How displaced steps are asked for; `optional` beside others."""
    return [
        io.Int.Input(
            "warmup_steps",
            default=USUAL_WARMUP,
            min=0,
            max=10000,
            optional=optional,
            tooltip="Exact steps before displaced ones. More: nearer to exact, and slower.",
        ),
        io.Int.Input(
            "num_patches",
            default=0,
            min=0,
            max=64,
            optional=True,
            tooltip="Displaced steps on pp ranks: parts of the image that flow through the stages. 0: one a stage.",
        ),
    ]


class DisplacedSteps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DisplacedSteps",
            display_name="Displaced Steps",
            category="parallel",
            description="After some exact steps, ranks go on with what the others had a step ago, sent while they compute: "
            "faster on slow links, and not exact. For any sampler whose whole loop runs in the backend.",
            **search_aliases("distrifusion", "pipefusion"),
            inputs=[
                io.Model.Input("model", tooltip="A parallel MODEL."),
                *displaced_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The MODEL that asks for displaced steps.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, warmup_steps: int, num_patches: int = 0) -> io.NodeOutput:
        """Raises: UnsupportedError: not a parallel MODEL."""
        if not isinstance(model, RemotePatcher):
            raise UnsupportedError(
                "Only a parallel MODEL has displaced steps.", "Put Parallelize Model before this node."
            )
        return io.NodeOutput(with_displaced(model, Displaced(warmup_steps, num_patches)))
