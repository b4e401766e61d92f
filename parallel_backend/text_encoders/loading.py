"""An encoder's file as a model of the `transformers` package, strictly: nothing missing, nothing left over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint_files.layout import files_of
from ..errors import CheckpointError, ConfigError, in_a_line
from .files import NAMES, EncoderFile
from .open_clip_names import renamed

HEAD_DIM = 64
# Buffers and parts of the whole CLIP that older files carry along: a text encoder computes without them.
_OF_NO_USE = ("text_model.embeddings.position_ids", "logit_scale", "logit_bias")
_PROJECTION = "text_projection.weight"
# ComfyUI's mark on files of fp8 whose weights have scales beside them.
_SCALED = "scaled_fp8"


def load(file: EncoderFile, dtype: torch.dtype) -> nn.Module:
    """transformers' model of that encoder with its weights, on the CPU.

    CLIPs come with their projection. A CLIP-L whose file has none gets the identity, as diffusers gives it.

    Raises: CheckpointError: a tensor is missing, left over or of another shape. ConfigError: transformers isn't installed.
    """
    transformers = import_transformers()
    tensors = _tensors(file, dtype)
    if file.kind == "t5":
        cls, config = transformers.T5EncoderModel, transformers.T5Config(**(file.config or _t5_config(tensors, file)))
    else:
        cls = transformers.CLIPTextModelWithProjection
        config = transformers.CLIPTextConfig(**(file.config or _clip_config(tensors, file)))
        if file.kind == "clip_l" and _PROJECTION not in tensors:
            tensors[_PROJECTION] = torch.eye(config.projection_dim, config.hidden_size, dtype=dtype)
    with _quiet(transformers):
        try:
            # None for the name: the weights are these tensors, and nothing is looked up.
            model, told = cls.from_pretrained(
                None, config=config, state_dict=tensors, torch_dtype=dtype, output_loading_info=True
            )
        except RuntimeError as error:  # sizes that don't fit
            raise _unfit(file, in_a_line(error)) from None
    for what in ("missing_keys", "unexpected_keys"):
        if names := sorted(told[what]):
            raise _unfit(file, f"{len(names)} {what.replace('_keys', ' tensors')}, such as {names[0]}")
    return model.eval().requires_grad_(False)


def _unfit(file: EncoderFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file.path.name} is not a whole {NAMES[file.kind]}: {what}.", "Download it again.")


def import_transformers() -> Any:
    """Raises: ConfigError: it isn't installed, or doesn't fit what is."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"Text encoders need the package transformers, which could not be imported ({in_a_line(error)}).",
            "Run: pip install 'parallel-mmdit[text]', or: pip install transformers sentencepiece protobuf",
        ) from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Its bars and tables stay away: what is wrong is told by our errors."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tensors(file: EncoderFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """By transformers' names, in a dtype to compute with: fp8 is one to store in."""
    found: dict[str, Tensor] = {}
    for part in files_of(file.path):
        for name, tensor in load_file(part).items():
            if name.startswith(file.prefix):
                found[name.removeprefix(file.prefix)] = tensor
    if _SCALED in found:
        raise CheckpointError(
            f"{file.path.name} is in fp8 with scales, which this path doesn't read.",
            "Use the file in fp16, or the one in plain fp8 (t5xxl_fp8_e4m3fn).",
        )
    found = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    found = renamed(found) if file.is_open_clip else found
    return {name: tensor for name, tensor in found.items() if name not in _OF_NO_USE}


def _clip_config(tensors: dict[str, Tensor], file: EncoderFile) -> dict[str, Any]:
    """The sizes of a CLIP in a single file. The activation is no tensor's business: CLIP-L's is OpenAI's quick one."""
    try:
        vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
        positions = len(tensors["text_model.embeddings.position_embedding.weight"])
        inner = len(tensors["text_model.encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise _unfit(file, f"it lacks {error.args[0]}") from None
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": len(tensors[_PROJECTION]) if _PROJECTION in tensors else width,
        "intermediate_size": inner,
        "num_attention_heads": width // HEAD_DIM,
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers."),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu" if file.kind == "clip_l" else "gelu",
        # Its vocabulary ends with the mark of a text's begin and that of its end.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _t5_config(tensors: dict[str, Tensor], file: EncoderFile) -> dict[str, Any]:
    """The sizes of a T5 1.1 in a single file."""
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight", torch.empty(0)))
    first = "encoder.block.0.layer."
    try:
        vocabulary, width = tensors["shared.weight"].shape
        inner = len(tensors[f"{first}1.DenseReluDense.wi_0.weight"])
        buckets, heads = tensors[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
        keys = len(tensors[f"{first}0.SelfAttention.q.weight"])
    except (KeyError, ValueError) as error:
        raise _unfit(file, f"it lacks {error.args[0]}") from None
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": keys // heads,
        "d_ff": inner,
        "num_layers": _count(tensors, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _count(tensors: dict[str, Tensor], start: str) -> int:
    return 1 + max(int(name.removeprefix(start).partition(".")[0]) for name in tensors if name.startswith(start))
