"""DemoCaption: captions of the demo's grammar as conditioning, for the small trained checkpoint of this pack."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..parallel_backend.demo.captions import encode
from ..parallel_backend.demo.files import MODELS
from ..parallel_backend.demo.scenes import known_words

EXAMPLE = "a red circle left of a large blue square on a yellow background"


def list_demo_models() -> None:
    """The demo's files stand in ComfyUI's lists, after the user's own, under `parallel_demo/`."""
    for folder in ("diffusion_models", "vae_approx"):
        folder_paths.add_model_folder_path(folder, str(MODELS / folder))


class DemoCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DemoCaption",
            display_name="Demo Caption (parallel)",
            category="parallel",
            description="A caption of the demo's small language as conditioning. Only for parallel_demo/mmdit.safetensors, "
            "which was trained on these captions; real models need real text encoders.",
            inputs=[
                io.String.Input(
                    "caption",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip=f"Empty for no prompt, or words of: {', '.join(known_words())}.",
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="In SD3's shapes.")],
        )

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        context, pooled = encode([caption])
        return io.NodeOutput([[context, {"pooled_output": pooled}]])
