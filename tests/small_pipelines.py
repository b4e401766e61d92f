"""Whole pipelines of random weights in diffusers' layout, and the same encoders as single files: of true widths, few layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from reference_models import diffusers_mmdit
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from parallel_backend.small_checkpoints.mmdit import mmdit_tensors, small_config
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

# Of T5's and of CLIP's small vocabularies.
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_clip_tokenizer(folder: Path, fills_with: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's, with letters for its whole vocabulary; the marks of begin and end come last, as in the real one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["!", *LETTERS, *(f"{letter}</w>" for letter in ["!", *LETTERS]), "re", "red</w>"]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=fills_with)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_t5_tokenizer(folder: Path) -> T5TokenizerFast:
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in ["▁", *LETTERS])]
    inner = Tokenizer(models.Unigram(words, unk_id=2))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(
        tokenizer_object=inner, vocab=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0
    )
    tokenizer.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def clip(width: int, vocabulary: int, *, projected: bool = True) -> Any:
    """CLIP-L or bigG, two layers of it."""
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 64,
        num_hidden_layers=2,
        hidden_act="quick_gelu" if width == 768 else "gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(vocabulary: int) -> T5EncoderModel:
    torch.manual_seed(5)
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 64, "num_heads": 2, "num_layers": 2}
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **sizes)).eval()


def vae(channels: int, scale: float, shift: float | None) -> AutoencoderKL:
    torch.manual_seed(channels)
    model = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        sample_size=128,
    )
    return model.eval()


def sd3_pipeline(folder: Path, *, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """SD3.5-medium's, saved in `folder`; 128 pixels a side where none is asked for."""
    config = small_config("sd3.5-medium", 2)
    first, second = (write_clip_tokenizer(folder / f"tokenizer{n}", fills) for n, fills in CLIP_FILLS)
    third = write_t5_tokenizer(folder / "tokenizer_3") if with_t5 else None
    transformer = diffusers_mmdit(config, mmdit_tensors(config))
    transformer.register_to_config(sample_size=16)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16, 1.5305, 0.0609),
        text_encoder=clip(768, len(first)),
        tokenizer=first,
        text_encoder_2=clip(1280, len(second)),
        tokenizer_2=second,
        text_encoder_3=t5(len(third)) if third is not None else None,
        tokenizer_3=third,
    )
    return _saved(pipeline, folder)


def sdxl_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """SDXL's, saved in `folder`; 128 pixels a side where none is asked for."""
    first, second = (write_clip_tokenizer(folder / f"tokenizer{n}", fills) for n, fills in CLIP_FILLS)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae(4, 0.13025, None),
        text_encoder=clip(768, len(first), projected=False),
        text_encoder_2=clip(1280, len(second)),
        tokenizer=first,
        tokenizer_2=second,
        unet=_sdxl_unet(),
        scheduler=scheduler,
        add_watermarker=False,
    )
    return _saved(pipeline, folder)


def _sdxl_unet() -> UNet2DConditionModel:
    """The small UNet under the name that SDXL's own has for the layer that takes sizes and pooled text."""
    config = CONFIGS["tiny"].diffusers() | {"class_embed_type": None, "sample_size": 16}
    unet = UNet2DConditionModel(**config, addition_embed_type="text_time", addition_time_embed_dim=256)
    tensors = random_unet(CONFIGS["tiny"]).state_dict()
    unet.load_state_dict({name.replace("class_embedding.", "add_embedding."): t for name, t in tensors.items()})
    return unet.eval()


# What fills up the texts of the first and the second tokenizer.
CLIP_FILLS = (("", "<|endoftext|>"), ("_2", "!"))


def _saved(pipeline: Any, folder: Path) -> Any:
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def single_file(path: Path, model: Any, dtype: torch.dtype = torch.float32) -> Path:
    """An encoder as ComfyUI's users have it."""
    save_file(as_in_a_file(model, dtype), path)
    return path


def as_in_a_file(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Its tensors as files of today name them, whatever transformers calls them inside."""
    tensors = {name: tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}
    if isinstance(model, T5EncoderModel):
        tensors.pop("encoder.embed_tokens.weight", None)
        return tensors
    whole = {"text_projection.weight"} | {name for name in tensors if name.startswith("text_model.")}
    return {name if name in whole else f"text_model.{name}": tensor for name, tensor in tensors.items()}


def as_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """BigG as SDXL's single files hold it."""
    found = {
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": tensors["text_model.final_layer_norm.weight"],
        "ln_final.bias": tensors["text_model.final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for layer in (0, 1):
        theirs, ours = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found |= {
                f"{theirs}.attn.in_proj_{kind}": torch.cat(qkv),
                f"{theirs}.attn.out_proj.{kind}": tensors[f"{ours}.self_attn.out_proj.{kind}"],
                f"{theirs}.ln_1.{kind}": tensors[f"{ours}.layer_norm1.{kind}"],
                f"{theirs}.ln_2.{kind}": tensors[f"{ours}.layer_norm2.{kind}"],
                f"{theirs}.mlp.c_fc.{kind}": tensors[f"{ours}.mlp.fc1.{kind}"],
                f"{theirs}.mlp.c_proj.{kind}": tensors[f"{ours}.mlp.fc2.{kind}"],
            }
    return found
