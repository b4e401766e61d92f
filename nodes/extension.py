"""The list of nodes, in ComfyUI's V3 form."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .conditioning_file import LoadConditioning, SaveConditioning
from .controlnet_files import remember_files
from .demo_caption import DemoCaption
from .displaced_steps import DisplacedSteps
from .everywhere import Everywhere
from .load_checkpoint import LoadParallelCheckpoint
from .load_controlnet import LoadParallelControlNet
from .load_models import LoadParallelMMDiT, LoadParallelUNet
from .mesh_config import MeshConfig
from .node_text import with_own_text
from .parallel_sampler import ParallelSampler
from .parallelize import ParallelizeModel, ParallelizeVAE
from .patch_parallel_vae import PatchParallelVAE
from .routes import add_routes
from .step_cache import ParallelStepCache


class ParallelMMDiTExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = [
            MeshConfig,
            ParallelizeModel,
            ParallelizeVAE,
            LoadParallelCheckpoint,
            LoadParallelMMDiT,
            LoadParallelUNet,
            LoadParallelControlNet,
            ParallelSampler,
            DisplacedSteps,
            ParallelStepCache,
            PatchParallelVAE,
            SaveConditioning,
            LoadConditioning,
            DemoCaption,
        ]
        return [with_own_text(node) for node in nodes]


async def comfy_entrypoint() -> ParallelMMDiTExtension:
    everywhere = Everywhere()
    everywhere.install()
    remember_files()
    add_routes(everywhere)
    return ParallelMMDiTExtension()
