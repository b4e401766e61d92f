"""Images of any shape to Patch Parallel VAE in a real ComfyUI: encoded as its own VAE does, or refused with what helps."""

from __future__ import annotations

import pytest
import torch
from comfyui.prompts import Prompt, mesh, out, save_latent
from comfyui.server import ComfyServer
from test_comfyui_nodes import latent_of

pytestmark = pytest.mark.usefixtures("comfy_backend")


def encoded(prompt: Prompt, node: str, loader: str, channels: int, height: int, width: int) -> str:
    more = {} if loader == "VAELoader" else {"mesh": mesh(prompt)}
    vae = out(prompt.add(loader, vae_name="taesd3", **more))
    image = out(prompt.add("ProbeRandomImage", seed=3, channels=channels, height=height, width=width))
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8} if "Tiled" in node else {}
    return save_latent(prompt, out(prompt.add(node, pixels=image, vae=vae, **tiles)), loader)


@pytest.mark.parametrize("node", ["VAEEncode", "VAEEncodeTiled"])
def test_alpha_is_left_out_and_odd_sizes_are_cropped_as_stock_does(node: str, server: ComfyServer) -> None:
    latents = []
    for loader in ("VAELoader", "PatchParallelVAE"):
        prompt = Prompt()
        saved = encoded(prompt, node, loader, 4, 67, 45)
        latents.append(latent_of(server, server.run(prompt.nodes), saved))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("node", ["VAEEncode", "VAEEncodeTiled"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 64, 64), "It is grey: repeat its channel"), ((3, 7, 64), "An image of 64 x 7 pixels")],
    ids=["grey", "small"],
)
def test_an_image_that_cannot_be_encoded_is_told_what_would_help(
    node: str, shape: tuple[int, int, int], words: str, server: ComfyServer
) -> None:
    prompt = Prompt()
    encoded(prompt, node, "PatchParallelVAE", *shape)
    assert words in server.run(prompt.nodes).message
