"""DemoCaption: captions of the demo's grammar as conditioning, for models that `parallel-mmdit train` makes, such as the demo's."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..parallel_backend.demo.captions import SD3_WIDTHS, SDXL_WIDTHS, encode
from ..parallel_backend.demo.files import PIXELS
from ..parallel_backend.demo.scenes import CAPTIONS, known_words

WIDTHS = {"SD3": SD3_WIDTHS, "SDXL": SDXL_WIDTHS}
CHANNELS = {"SD3": 16, "SDXL": 4}
DEFAULT = "SD3"


class DemoCaption(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DemoCaption",
            display_name="Demo Caption (parallel)",
            category="parallel",
            description="A caption of the demo's small language as conditioning, and an empty latent of the size that the demo's models "
            f"draw: {PIXELS} x {PIXELS} pixels. Only for the models of parallel_demo and those of your own `parallel-mmdit train`, which "
            "learn these captions; real models need real text encoders.",
            inputs=[
                io.String.Input(
                    "caption",
                    default=CAPTIONS[0],
                    multiline=True,
                    tooltip=f"Empty for no prompt, or words of: {', '.join(known_words())}.",
                ),
                io.Combo.Input(
                    "model",
                    options=list(WIDTHS),
                    default=DEFAULT,
                    optional=True,
                    tooltip="SD3 for mmdit.safetensors and `train mmdit`, SDXL for unet.safetensors and `train unet`. "
                    f"All of them draw {PIXELS} x {PIXELS} pixels.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="In the model's shapes."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip=f"Empty, of {PIXELS} x {PIXELS} pixels, for the sampler: the demo's models draw other sizes badly.",
                ),
            ],
        )

    @classmethod
    def execute(cls, caption: str, model: str = DEFAULT) -> io.NodeOutput:
        context, pooled = encode([caption], WIDTHS[model])
        latent = torch.zeros(1, CHANNELS[model], PIXELS // 8, PIXELS // 8)
        return io.NodeOutput([[context, {"pooled_output": pooled}]], {"samples": latent})
