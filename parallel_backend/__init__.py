"""One image on many GPUs: the backend of the ComfyUI pack `parallel-mmdit`, and its Python face.

A `Backend` is a set of torchrun ranks that outlives its clients:

    backend = Backend.attach_or_start(world_size=2, device="cpu")
    model = backend.load_model("sd3.5_medium.safetensors", mesh=MeshSpec(cfg=2))
    latent = model.sample(latent, positive=..., negative=..., seed=1, steps=20)
"""

from .client.backend import Backend
from .client.remote import RemoteModel
from .client.remote_control import ControlUse, RemoteControl
from .client.remote_vae import RemoteVAE
from .client.weight_patches import WeightPatches
from .config import MeshSpec, SamplerSpec
from .rpc.conditioning import Conditioning
from .version import __version__

__all__ = [
    "Backend",
    "Conditioning",
    "ControlUse",
    "MeshSpec",
    "RemoteControl",
    "RemoteModel",
    "RemoteVAE",
    "SamplerSpec",
    "WeightPatches",
    "__version__",
]
