"""SDXL's UNet in horizontal bands, one per rank of the patch axis: diffusers' model with banded layers put in place.

Sources: Podell et al. 2023 (arXiv 2307.01952); bands: Li et al. 2024 (arXiv 2402.19481).
Shapes: B rows, C latent channels, Y X latent cells, L text tokens, E context width, A micro-conditioning width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..config import ContinuousSampling
from ..distributed.band import Band, Cut
from ..distributed.band_attention import CachedCrossAttention
from ..distributed.band_conv import CuttingConv2d
from ..distributed.collectives import all_gather, split_sizes
from ..distributed.mesh import Mesh, MeshAxis
from ..distributed.patch_layers import join_projections, place_band_layers
from ..distributed.sites import Place, UNetSites
from ..distributed.sliced_weights import SlicedWeights
from ..distributed.stale import Kept, StaleExchanges, Step
from ..distributed.step_cache import BranchCache
from ..errors import ConfigError
from ..quantized.weight import QuantizedWeight
from .extra import Extra
from .inputs import Inputs
from .prepared import PreparedPrompt
from .residuals import NONE, Residuals, check_count, check_residual
from .shallow_unet import on_deep, shallow_output
from .unet_blocks import BlockByBlock

HEAD_DIM = 64
NORM_GROUPS = 32
SIZE_FREQUENCIES = 256
# What is gathered at once where weights are sliced: nearly all of the weights are in these.
SLICED_BLOCKS = (ResnetBlock2D, BasicTransformerBlock, Downsample2D, Upsample2D)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of one UNet, as its checkpoint's header gives them. Depths are transformer blocks, by block and layer.

    `channels` are the latent's, in and out; `extra_channels` go in beside them: an inpainting model's mask and masked latent, an
    edit model's picture. `edm` is the sampling that the file says, where it isn't Stable Diffusion's.
    """

    family: str
    channels: int
    block_channels: tuple[int, ...]
    layers_per_block: int
    down_depths: tuple[tuple[int, ...], ...]
    up_depths: tuple[tuple[int, ...], ...]
    mid_depth: int | None
    context_width: int
    pooled_width: int
    v_prediction: bool = False
    zero_snr: bool = False
    extra_channels: int = 0
    edm: ContinuousSampling | None = None
    head_dim = HEAD_DIM

    @property
    def heads(self) -> int:
        """The most that an attention has."""
        return max(self.block_channels) // HEAD_DIM

    @property
    def row_unit(self) -> int:
        """Rows of latent cells that become one row at the coarsest scale."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Of what each input block gives, in the single-file layout's order: its channels, and how often its sides were halved."""
        places, coarsest = [(self.block_channels[0], 0)], len(self.block_channels) - 1
        for level, channels in enumerate(self.block_channels):
            places += [(channels, level)] * self.layers_per_block + [(channels, level + 1)] * (level < coarsest)
        return places

    def diffusers(self) -> dict[str, Any]:
        """The settings of diffusers' UNet2DConditionModel.

        Micro-conditioning comes as one vector, which diffusers calls a class embedding by projection.
        """
        heads = tuple(
            max(1, channels // HEAD_DIM) for channels in self.block_channels
        )  # unused where there is no attention
        mid = {None: None, 0: "UNetMidBlock2D"}.get(self.mid_depth, "UNetMidBlock2DCrossAttn")
        return {
            "in_channels": self.channels + self.extra_channels,
            "out_channels": self.channels,
            "block_out_channels": self.block_channels,
            "layers_per_block": self.layers_per_block,
            "down_block_types": tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in self.down_depths),
            "up_block_types": tuple("CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in self.up_depths),
            "mid_block_type": mid,
            # The middle block takes the last entry.
            "transformer_layers_per_block": [*(list(d) for d in self.down_depths), [self.mid_depth]],
            "reverse_transformer_layers_per_block": [list(d) for d in self.up_depths],
            "attention_head_dim": heads,
            "cross_attention_dim": self.context_width,
            "use_linear_projection": True,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": self.pooled_width,
            "norm_num_groups": NORM_GROUPS,
        }


class InBands:
    """A diffusers model that works on this rank's band of a latent: the UNet, and what gives it residuals."""

    def __init__(self, model: Any, config: UNetConfig, mesh: Mesh, kernel: str, path: str = "") -> None:
        """`model` is from `with_joined_projections`, with its weights. `path` tells its layers' slots from other models' in a job."""
        self.config, self.mesh = config, mesh
        self.band = Band(mesh.patch)
        first, model.conv_in = model.conv_in, nn.Identity()
        place_band_layers(model, self.band, kernel, path)
        model.conv_in = CuttingConv2d(first, self.band)
        self.model = model
        for kernel_OCYX in (p for p in model.parameters() if p.ndim == 4 and not isinstance(p, QuantizedWeight)):
            kernel_OCYX.data = kernel_OCYX.data.to(memory_format=torch.channels_last)
        self.slices: SlicedWeights | None = model.slices
        if self.slices is not None:
            self.slices.attach()

    def _axis_for(self, height: int, width: int) -> MeshAxis:
        """The ranks that share a latent out. One that is too small to be cut is computed whole by each of them: that takes no time,
        and nothing need be sent."""
        degree, unit = self.mesh.patch.degree, self.config.row_unit
        return self.mesh.patch if height > unit * (degree - 1) and width >= unit else MeshAxis("band")

    def cut_of(self, height: int, width: int) -> Cut:
        """How the ranks share a latent of that size out."""
        axis = self._axis_for(height, width)
        return Cut(axis, tuple(band_rows(height, axis.degree, self.config.row_unit)), width)

    def prepare_prompt(self, context_BLE: Tensor, y_BA: Tensor) -> PreparedPrompt:
        """Keys and values of each attention to the prompt, (B, L, 2 * D) by its slot.

        Comm: where weights are sliced, those that make them.
        """
        tensors = {}
        for layer in self.model.modules():
            processor = getattr(layer, "processor", None)
            if isinstance(processor, CachedCrossAttention):
                with nullcontext() if self.slices is None else self.slices.whole(layer.to_kv):
                    tensors[processor.slot] = layer.to_kv(context_BLE)
        return PreparedPrompt(context_BLE, y_BA, tensors)

    def at_steps(self, prepared: PreparedPrompt, timesteps: Sequence[float], most_bytes: int) -> list[PreparedPrompt]:
        """It makes nothing of timesteps ahead."""
        return [prepared for _ in timesteps]

    @contextmanager
    def cut(
        self,
        x_BCYX: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        sites: UNetSites | None = None,
        *,
        is_whole: bool = True,
    ) -> Iterator[Band]:
        """Inside, the model takes a latent of that size in bands, with that prompt and what acts at these sites, at that step;
        `is_whole`: all of its blocks compute."""
        band, (rows, columns) = self.band, x_BCYX.shape[2:]
        band.cut, band.step = self.cut_of(rows, columns), step
        band.prompt_kv, band.sites = prepared.tensors, sites
        if self.slices is not None:
            self.slices.begin(is_whole)
        try:
            yield band
        finally:
            band.step, band.prompt_kv, band.sites = Step(), {}, None  # what the job keeps must not live on in the model


class BandUNet(InBands):
    """The UNet's output at a latent, computed by all ranks of a mesh; every rank has the whole input and output.

    Its model is a `loadable_unet`.
    """

    step_caches = ("deepcache",)

    def __init__(self, model: Any, config: UNetConfig, mesh: Mesh, kernel: str) -> None:
        super().__init__(model, config, mesh, kernel)
        self._added = NONE
        self._cache: BranchCache | None = None
        # Blocks take the embedding of the timestep with its SiLU: computed once in place of once for each.
        model.time_embed_act = nn.SiLU()
        for resnet in [module for module in model.modules() if isinstance(module, ResnetBlock2D)]:
            resnet.skip_time_act = True
        for number, block in enumerate(input_blocks(model)):
            block.register_forward_hook(partial(self._add, number))
        on_deep(model, self._keep)
        self.places = attention_places(model)
        for place, block in self.places.items():
            processors: list[Any] = [block.attn1.processor, block.attn2.processor]
            for processor in processors:
                processor.place = place
            block.register_forward_pre_hook(partial(self._come_to, place))

    def check_size(self, height: int, width: int, text_tokens: int) -> None:
        """Any size can be computed: see `_axis_for`."""

    def most_patches(self, height: int) -> int:
        return 1

    def new_job(self, displaced: bool, num_patches: int = 1) -> Kept:
        """What a job of this model keeps between its evaluations."""
        return Kept(StaleExchanges(self.mesh.patch) if displaced and self.mesh.patch.degree > 1 else None)

    def prepare(self, context: Tensor, pooled: Tensor) -> PreparedPrompt:
        """As `prepare_prompt`. `pooled`: the pooled prompt and the embedded sizes."""
        return self.prepare_prompt(context, pooled)

    def own_residuals(self, whole: Residuals, height: int, width: int) -> Residuals:
        """This rank's bands of residuals that are whole: (B, C, Y, X), Y and X those of their place.

        Raises: InputError: they don't fit this model, or a latent of that size.
        """
        places, config = self.config.places, self.config
        cut = self.cut_of(height, width)

        def own(tensor: Tensor | None, where: str, channels: int, level: int) -> Tensor | None:
            if tensor is None:
                return None
            sides = [-(-side // 2**level) for side in (height, width)]
            check_residual(tensor, where, [channels, *sides])
            start, stop = cut.halved(level).own_rows
            return tensor[:, :, start:stop]

        def all_own(side: Sequence[Tensor | None], name: str) -> list[Tensor | None]:
            check_count(side, len(places), name)
            return [own(tensor, f"{name} {i}", *places[i]) for i, tensor in enumerate(side)]

        middle = own(whole.middle, "middle", config.block_channels[-1], len(config.block_channels) - 1)
        return Residuals(all_own(whole.input, "input"), middle, all_own(whole.output, "output"))

    def _add(self, place: int, block: nn.Module, inputs: object, out: Any) -> Any:
        """A hook of an input block, whose output may be a tuple of one."""
        added = self._added.input[place] if place < len(self._added.input) else None
        if added is None:
            return None
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

    def _come_to(self, place: Place, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """A hook of a transformer block, whose first input are its tokens."""
        works = () if self.band.sites is None else self.band.sites.block_input.get(place, ())
        if not works:
            return None
        tokens, *others = inputs
        for work in works:
            tokens = work(tokens, self.band)
        return (tokens, *others)

    def _keep(self, deep: Tensor) -> None:
        """What the deeper blocks gave is there for the evaluations that take it."""
        if self._cache is not None:
            self._cache.rest = deep.clone()  # a part of what would stay with it

    def _handed_on(self, residuals: Residuals) -> dict[str, Any]:
        """As diffusers takes them: one for each skip connection, or none at all; it adds a number as it adds a tensor."""
        if residuals.middle is None and not any(tensor is not None for tensor in residuals.output):
            return {}
        given = [*residuals.output, *[None] * (len(self.config.places) - len(residuals.output))]
        skips, middle = [0.0 if tensor is None else tensor for tensor in given], residuals.middle
        return {
            "down_block_additional_residuals": skips,
            "mid_block_additional_residual": 0.0 if middle is None else middle,
        }

    def inputs(
        self,
        x_BCYX: Tensor,
        timesteps_B: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
    ) -> Inputs:
        return Inputs(x_BCYX, {"timesteps": timesteps_B}, prepared, {}, residuals, extras)

    def __call__(
        self,
        x_BCYX: Tensor,
        timesteps_B: Tensor,
        prepared: PreparedPrompt,
        step: Step,
        residuals: Residuals = NONE,
        extras: Sequence[Extra] = (),
    ) -> Tensor:
        """What the model predicts (noise, or v) at `x`.

        Args:
            x_BCYX: full latent, scaled as the model takes it, and its extra channels, in the model's dtype.
            prepared: from `prepare`, of the same rows.
            residuals: of this rank's band, on the device and in the model's dtype.
            extras: of these rows, those that act.
        Returns: (B, C, Y, X), whole on every rank.
        Comm: as the layers say, and one all-gather of the output.
        """
        return self.evaluate(self.inputs(x_BCYX, timesteps_B, prepared, step, residuals, extras), step)

    def evaluate(self, inputs: Inputs, step: Step) -> Tensor:
        sites, cache = _sites_of(inputs.extras), step.cache
        deep = None if cache is None else cache.taken()
        with self.cut(inputs.x, inputs.prepared, step, sites, is_whole=deep is None) as band:
            latent = band.cut
            if sites is not None and sites.between_blocks:
                out = BlockByBlock(self.model, self.config.places, band, self.cut_of)(inputs, sites)
            else:
                out = self._through(inputs, cache, deep)
        whole = all_gather(out, 2, latent.rows, latent.axis)
        # After the output, which the next step waits for: a communicator works in order.
        if step.stale is not None:
            step.stale.end_evaluation()
        return whole

    def _through(self, inputs: Inputs, cache: BranchCache | None, deep: Tensor | None) -> Tensor:
        """This rank's band of the output; `deep`: what its deeper blocks gave before, where they aren't computed."""
        self._added, added, self._cache = inputs.residuals, self._handed_on(inputs.residuals), cache
        try:
            call = (self.model, inputs.x, inputs.changing["timesteps"], inputs.prepared.context)
            given = {"class_labels": inputs.prepared.pooled, **added}
            return _whole_output(*call, given) if deep is None else shallow_output(*call, given, deep)
        finally:
            self._added, self._cache = NONE, None


def loadable_unet(config: UNetConfig, mesh: Mesh) -> Any:
    """diffusers' model of these sizes, attention projections joined: what the checkpoint's tensors are loaded into.

    Where the mesh says so, it wants only this rank's slices of its blocks.

    Raises: ConfigError: widths that its norms can't group.
    """
    return with_joined_projections(UNet2DConditionModel, config, mesh)


def with_joined_projections(kind: Callable[..., Any], config: UNetConfig, mesh: Mesh) -> Any:
    """As `loadable_unet`, of any diffusers model that is made of a UNet's blocks; `kind` is its class."""
    if any(channels % NORM_GROUPS for channels in config.block_channels):
        raise ConfigError(f"Widths {config.block_channels} don't divide by {NORM_GROUPS}.", "Use an SDXL model.")
    model = kind(**config.diffusers()).eval()  # diffusers copies a block's input to channels first where it is trained
    join_projections(model)
    model.slices = SlicedWeights(mesh.weights) if mesh.weights.degree > 1 else None
    if model.slices is not None:
        for block in [module for module in model.modules() if isinstance(module, SLICED_BLOCKS)]:
            model.slices.cut(block)
    return model


def input_blocks(model: Any) -> list[nn.Module]:
    """Of diffusers' model, what each input block of the single-file layout ends in, in that order."""
    blocks = [model.conv_in]
    for down in model.down_blocks:
        blocks += getattr(down, "attentions", down.resnets)
        blocks += down.downsamplers or ()
    return blocks


def output_blocks(model: Any) -> list[nn.Module]:
    """As `input_blocks`, of the output blocks: the last part of each before an upsampling."""
    return [block for up in model.up_blocks for block in getattr(up, "attentions", up.resnets)]


def attention_places(model: Any) -> dict[Place, BasicTransformerBlock]:
    """The transformer blocks of diffusers' model, by the single-file layout's places."""
    sides = {"input": input_blocks(model), "output": output_blocks(model)}
    if model.mid_block is not None:
        sides["middle"] = list(getattr(model.mid_block, "attentions", []))
    return {
        (side, number, index): transformer
        for side, blocks in sides.items()
        for number, block in enumerate(blocks)
        for index, transformer in enumerate(getattr(block, "transformer_blocks", ()))
    }


def _whole_output(
    model: Any, x_BCYX: Tensor, timesteps_B: Tensor, context_BLE: Tensor, given: dict[str, Any]
) -> Tensor:
    return model(x_BCYX, timesteps_B, context_BLE, return_dict=False, **given)[0]  # type: ignore[no-any-return]


def _sites_of(extras: Sequence[Extra]) -> UNetSites | None:
    if not extras:
        return None
    sites = UNetSites()
    for extra in extras:
        extra.on_unet(sites)
    return sites


def band_rows(rows: int, degree: int, unit: int) -> list[int]:
    """Rows of each band: whole units, as even as can be; only the last band may end in a part of one."""
    counts = [unit * share for share in split_sizes(-(-rows // unit), degree)]
    counts[-1] -= sum(counts) - rows
    return counts


def micro_conditioning(pooled_BP: Tensor, sizes: Sequence[float]) -> Tensor:
    """(B, A): the pooled prompt and the embedded sizes, as SDXL takes them.

    Args:
        sizes: height, width, crop_y, crop_x, target height and target width in pixels; the refiner has an aesthetic
            score in place of the last two.
    """
    embedded = get_timestep_embedding(
        torch.tensor(sizes, dtype=torch.float32), SIZE_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    return torch.cat([pooled_BP, embedded.flatten().to(pooled_BP).expand(pooled_BP.shape[0], -1)], dim=1)
