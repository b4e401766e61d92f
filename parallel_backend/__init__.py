"""One image on many GPUs: the backend of the ComfyUI pack `parallel-mmdit`, and its Python face.

A `Backend` is a set of torchrun ranks that outlives its clients:

    with Backend() as backend:
        model = backend.load_model("sd3.5_medium.safetensors", text_encoders=["clip_l.safetensors", "clip_g.safetensors"])
        picture = model.generate("a photo of an astronaut riding a horse", seed=1).images[0]
"""

from .client.backend import Backend
from .client.generation import Generated
from .client.guidance import PerpNeg, WeakerModel
from .client.remote import RemoteModel
from .client.remote_control import ControlUse, RemoteControl
from .client.remote_vae import RemoteVAE
from .client.weight_patches import WeightPatches
from .config import MeshSpec, SamplerSpec, StepCache
from .config.guidance import APG, AwayFromWeaker
from .rpc.conditioning import Conditioning
from .text_encoders.protocol import TextEncoders
from .version import __version__

__all__ = [
    "APG",
    "AwayFromWeaker",
    "Backend",
    "Conditioning",
    "ControlUse",
    "Generated",
    "MeshSpec",
    "PerpNeg",
    "RemoteControl",
    "RemoteModel",
    "RemoteVAE",
    "SamplerSpec",
    "StepCache",
    "TextEncoders",
    "WeakerModel",
    "WeightPatches",
    "__version__",
]
