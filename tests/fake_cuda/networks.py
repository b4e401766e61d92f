"""Models at their true widths on the fake device, with weights that have shapes alone, and a job of a few evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from parallel_backend.bench.layouts import SD35_LARGE, SD35_MEDIUM
from parallel_backend.bench.layouts import SDXL as SDXL_SIZES
from parallel_backend.config import MeshSpec
from parallel_backend.distributed.band import Band
from parallel_backend.distributed.mesh import BandAxes, Mesh, build_mesh
from parallel_backend.distributed.patch_layers import place_band_layers
from parallel_backend.distributed.stale import Kept, Phase, Step
from parallel_backend.fused.group_norm import part_sizes, shares_of
from parallel_backend.models.families import FROM_SCRATCH, SD3, SDXL
from parallel_backend.models.from_scratch import FromScratch, FromScratchConfig, GridPositions
from parallel_backend.models.mmdit import MMDiT, MMDiTConfig
from parallel_backend.models.network import TokenNetwork
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt
from parallel_backend.models.share import Share
from parallel_backend.models.unet import BandUNet, UNetConfig, band_rows, loadable_unet
from parallel_backend.models.vae import BandVAE
from parallel_backend.quantized.forms import GGUF, ScaledFP8
from parallel_backend.quantized.weight import Part, QuantizedWeight, multiply_in_fp8

from .device import DEVICE, on_cuda, put_weights

Config = MMDiTConfig | FromScratchConfig | UNetConfig
# Of 256 values.
_BYTES = {"Q8_0": 272, "Q4_K": 144, "Q6_K": 210, "IQ4_XS": 136}
TIMESTEPS = [torch.tensor(500.0), torch.tensor(400.0)]
_SDXL = {"family": "sdxl", "channels": 4, "context_width": 2048, "pooled_width": 2816}


def large(depth: int = 38) -> MMDiTConfig:
    return replace(SD35_LARGE, depth=depth)


def medium(depth: int = 24, dual: int = 13) -> MMDiTConfig:
    return replace(SD35_MEDIUM, depth=depth, dual_blocks=tuple(range(dual)))


def from_scratch(depth: int = 19) -> FromScratchConfig:
    widths: Any = {"hidden": 1216, "mlp_width": 4864, "context_width": 2304, "pooled_width": 1536}
    return FromScratchConfig(depth=depth, heads=19, mlp="swiglu", rotary=True, channels=16, patch_size=2, **widths)


def sdxl() -> UNetConfig:
    return SDXL_SIZES


def shallow_sdxl() -> UNetConfig:
    """Each kind of layer that SDXL has, as few times as can be."""
    return UNetConfig(
        **_SDXL,  # type: ignore[arg-type]
        block_channels=(320, 640),
        layers_per_block=1,
        down_depths=((0,), (1,)),
        up_depths=((1, 1), (0, 0)),
        mid_depth=1,
    )


class _KeptRows:
    """A position table that has read its file's rows already: it does so at the first evaluation of a size."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._width, self._dtype = width, dtype

    def rows(self, rows: int, columns: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        return on_cuda(sum(stop - start for start, stop in ranges), self._width, dtype=self._dtype)


def predictor(config: Config, spec: MeshSpec, dtype: torch.dtype = torch.bfloat16, form: str = "") -> Predictor:
    """The model of these sizes as this rank of the mesh has it; `form` as `quantise` takes it."""
    mesh = build_mesh(spec)
    if isinstance(config, UNetConfig):
        unet = _unet(config, mesh)
        put_weights(unet, dtype)
        quantise(unet, form) if form else None
        unet.to = lambda **_: unet  # type: ignore[method-assign]  # the weights lie channels last already
        return Predictor(BandUNet(unet, config, mesh, "native"), mesh, dtype, DEVICE, SDXL)
    kind, module = (SD3, MMDiT) if isinstance(config, MMDiTConfig) else (FROM_SCRATCH, FromScratch)
    with torch.device("meta"):
        model = module(config, mesh, "native")
    put_weights(model, dtype)
    quantise(model, form) if form else None
    positions = _KeptRows(config.hidden, dtype) if kind is SD3 else GridPositions(DEVICE)
    return Predictor(TokenNetwork(model, positions), mesh, dtype, DEVICE, kind)


def quantise(module: nn.Module, form: str) -> None:
    """Its matrices stay quantised as files of that form leave them: fp8 (with one scale, or one for each row), or a type of GGUF's."""
    for name, parameter in list(module.named_parameters()):
        if parameter.ndim != 2 or parameter.shape[1] % 256:
            continue
        (rows, columns), (owner, _, leaf) = parameter.shape, name.rpartition(".")
        if form.startswith("fp8"):
            scale = on_cuda(rows if form == "fp8 by rows" else 1)
            part = Part(ScaledFP8(), (on_cuda(rows, columns, dtype=torch.float8_e4m3fn), scale), (0, rows))
        else:
            part = Part(GGUF(form), (on_cuda(rows, columns // 256 * _BYTES[form], dtype=torch.uint8),), (0, rows))
        weight = QuantizedWeight([part], parameter.shape, parameter.dtype)
        if form == "fp8 products":
            multiply_in_fp8(weight, bare=False)
        setattr(module.get_submodule(owner), leaf, weight)


def _unet(config: UNetConfig, mesh: Mesh) -> Any:
    with torch.device("meta"):
        return loadable_unet(config, mesh)


@dataclass
class Evaluations:
    """Evaluations of one picture with guidance, one after the other, as a sampling job makes them."""

    predictor: Predictor
    pixels: tuple[int, int] = (1024, 1024)
    displaced: bool = False
    tokens: tuple[int, int] = (154, 154)
    rows: int = 1
    kept: Kept = field(init=False)
    _step: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        network, mesh = self.predictor.network, self.predictor.mesh
        self.kept = network.new_job(self.displaced, mesh.pp.degree)
        if isinstance(network, BandUNet):
            # As after the first evaluation of this size: the shares of bands and of parts of them are on the device.
            rows = band_rows(self.shape[2], mesh.patch.degree, network.config.row_unit)
            for scale in range(len(network.config.block_channels)):
                counts = [-(-count // 2**scale) for count in rows]
                pixels = counts[mesh.patch.rank] * -(-self.shape[3] // 2**scale)
                shares_of(tuple(counts), DEVICE)
                shares_of(part_sizes(pixels), DEVICE)

    @property
    def prompts(self) -> list[Prompt]:
        config, dtype = self.predictor.network.config, self.predictor.dtype
        return [
            Prompt(
                on_cuda(self.rows, tokens, config.context_width, dtype=dtype),
                on_cuda(self.rows, config.pooled_width, dtype=dtype),
            )
            for tokens in self.tokens
        ]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.rows, self.predictor.network.config.channels, *(side // 8 for side in self.pixels)  # type: ignore[return-value]

    def share(self) -> Share:
        """Of a job with prompts of its own."""
        return self.predictor.share(self.rows, self.prompts)

    def next(self, phase: Phase = "sync", share: Share | None = None) -> list[Tensor]:
        """Of the first timestep, then of the next in turn: a job of two steps over and over."""
        share = share or self.share()
        share.foresee(TIMESTEPS)
        self._step += 1
        timestep = TIMESTEPS[(self._step - 1) % len(TIMESTEPS)]
        return self.predictor.outputs(on_cuda(*self.shape), timestep, share, Step(0, phase, kept=self.kept))


def kl_vae(dtype: torch.dtype, layers: int = 2) -> BandVAE:
    """SD3's VAE, in bands over the world."""
    levels = 4
    with torch.device("meta"):
        model = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return _in_bands(model, "kl-16", dtype)


def taesd(dtype: torch.dtype, layers: int = 3) -> BandVAE:
    blocks = {"num_encoder_blocks": (1, *(layers,) * 3), "num_decoder_blocks": (*(layers,) * 3, 1)}
    with torch.device("meta"):
        model = AutoencoderTiny(latent_channels=16, **blocks)
    return _in_bands(model, "taesd3", dtype)


def _in_bands(model: nn.Module, family: str, dtype: torch.dtype) -> BandVAE:
    put_weights(model, dtype)
    band = Band()
    for part in (model.encoder, model.decoder):
        place_band_layers(part, band)
    return BandVAE(model, family, 16, DEVICE, dtype, band, BandAxes())
