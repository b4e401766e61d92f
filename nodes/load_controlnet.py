"""LoadParallelControlNet: a ControlNet that the ranks compute, or a refusal that says why they can't."""

from __future__ import annotations

from comfy_api.latest import io

from ..parallel_backend.demo.files import CONTROL_FILE
from .controlnet_files import control_in_ranks
from .known_to_core import search_aliases
from .model_files import fingerprint, own_names_in, path_of, taken_for, validity
from .node_text import say

FOLDER = "controlnet"


class LoadParallelControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadParallelControlNet",
            display_name="Load Parallel ControlNet",
            category="parallel",
            description="A ControlNet that the ranks compute in the split of the parallel MODEL that it is used with. "
            "ComfyUI's own Load ControlNet Model does so too where the ranks know the file, and computes it itself where they "
            "don't; this one refuses then.",
            **search_aliases("controlnet", "control net", "multi gpu"),
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=list(dict.fromkeys([*own_names_in(FOLDER), CONTROL_FILE.listed])),
                    tooltip="An SDXL ControlNet (union ones and GGUF too), one of SD3 or SD3.5, or the demo's, for its UNet and edges.",
                )
            ],
            outputs=[
                io.ControlNet.Output(
                    display_name="control_net", tooltip="For Apply ControlNet, on prompts of a parallel MODEL."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, control_net_name: str | None = None) -> bool | str:
        return validity(control_net_name, FOLDER)

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str) -> str:
        return fingerprint(control_net_name, FOLDER)

    @classmethod
    def execute(cls, control_net_name: str) -> io.NodeOutput:
        control = control_in_ranks(path_of(control_net_name, FOLDER))
        say(taken_for(control_net_name, FOLDER), log=True)
        return io.NodeOutput(control)
