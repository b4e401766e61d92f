"""SaveConditioning and LoadConditioning: prompts as files, for machines without a text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..parallel_backend.errors import CheckpointError, UnsupportedError
from .model_files import file_fingerprint

KIND = "comfyui conditioning"
FROM_OUTPUT = " [output]"
SUFFIX = ".safetensors"
PLAIN_NAME = "conditioning"


def write_conditioning(conditioning: list[Any], path: Path) -> None:
    """Every tensor, number and word of each entry; its values are read back equal.

    Raises: UnsupportedError: an entry has something else, such as a ControlNet or hooks: named.
    """
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for index, (context, extras) in enumerate(conditioning):
        tensors[f"{index}.context"] = context
        plain = {}
        for key, value in extras.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            elif _is_plain(value):
                plain[key] = {"tuple": list(value)} if isinstance(value, tuple) else value
            else:
                raise UnsupportedError(
                    f"Entry {index + 1} has {key!r}, a {type(value).__name__}, which a file can't hold.",
                    "Save the conditioning before the node that adds it.",
                )
        entries.append(plain)
    # Copies: entries may share a tensor, which the format has no word for.
    kept = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(kept, path, metadata={"kind": KIND, "entries": json.dumps(entries)})


def read_conditioning(path: Path) -> list[Any]:
    """Raises: CheckpointError: not such a file, or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} can't be read: {error}.", "Save it again.") from None
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path.name} holds no conditioning.", "Choose a file that SaveConditioning wrote.")
    conditioning = []
    for index, plain in enumerate(json.loads(metadata["entries"])):
        extras = {k: tuple(v["tuple"]) if isinstance(v, dict) else v for k, v in plain.items()}
        own = {name.split(".", 1)[1]: tensor for name, tensor in tensors.items() if name.split(".", 1)[0] == str(index)}
        conditioning.append([own.pop("context"), extras | own])
    return conditioning


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) and not isinstance(part, (list, tuple)) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def conditioning_names() -> list[str]:
    """Files of the input folder, then those of the output folder, marked as ComfyUI marks them."""
    found = []
    for folder, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), FROM_OUTPUT)):
        files = sorted(path for path in Path(folder).rglob(f"*{SUFFIX}") if _is_conditioning(path))
        found += [path.relative_to(folder).as_posix() + mark for path in files]
    return found


def _is_conditioning(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("kind") == KIND
    except (SafetensorError, OSError):
        return False


def visible(prefix: str) -> str:
    """The prefix, with a plain name in place of none, and without the dots that would hide the file."""
    folder, slash, name = prefix.rpartition("/")
    return f"{folder}{slash}{name.lstrip('. ') or PLAIN_NAME}"


def path_of_conditioning(name: str) -> Path:
    """Raises: CheckpointError: no such file, or one outside ComfyUI's input and output folders."""
    root = folder_paths.get_output_directory() if name.endswith(FROM_OUTPUT) else folder_paths.get_input_directory()
    path = Path(root, name.removesuffix(FROM_OUTPUT)).resolve()
    if not path.is_relative_to(Path(root).resolve()) or not path.is_file():
        raise CheckpointError(f"There is no conditioning file {name!r}.", "Put it into ComfyUI's input folder.")
    return path


class SaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveConditioning",
            display_name="Save Conditioning",
            category="parallel",
            description="Writes a prompt's conditioning to a file, so that it can be used without its text encoders.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From any text encoder, of SD3 or SDXL."),
                io.String.Input("filename_prefix", default="conditioning/prompt", tooltip="Below the output folder."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list[Any], filename_prefix: str) -> io.NodeOutput:
        root = folder_paths.get_output_directory()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(visible(filename_prefix), root)
        file = f"{name}_{counter:05}_{SUFFIX}"
        write_conditioning(conditioning, Path(folder, file))
        return io.NodeOutput(ui=ui.PreviewText(f"{Path(subfolder, file).as_posix()}{FROM_OUTPUT}"))


class LoadConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadConditioning",
            display_name="Load Conditioning",
            category="parallel",
            description="A prompt's conditioning from a file that Save Conditioning wrote.",
            inputs=[
                io.Combo.Input(
                    "name", options=conditioning_names(), tooltip="A file of ComfyUI's input or output folder."
                )
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="As it was saved.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return file_fingerprint(path_of_conditioning(name))

    @classmethod
    def validate_inputs(cls, name: str) -> bool:
        path_of_conditioning(name)  # a file written since ComfyUI listed them is as good
        return True

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(read_conditioning(path_of_conditioning(name)))
