"""The nodes in a real ComfyUI, over its HTTP API: equal to its own nodes on the same files, and errors by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.prompts import Prompt, conditioning, mesh, out, sampler, save_latent
from comfyui.server import ComfyServer, Outcome
from rank_pool import free_port
from safetensors.torch import load_file
from served import wait_until
from test_from_scratch import write_pickle
from torch import Tensor

from parallel_backend import Backend
from parallel_backend.rpc.keys import Keys

MODEL = "sd3.5-medium.safetensors"


pytestmark = pytest.mark.usefixtures("comfy_backend")


def latent_of(server: ComfyServer, outcome: Outcome, node: str) -> Tensor:
    assert outcome.error is None, outcome.error
    saved = outcome.outputs[node]["latents"][0]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def local_model(prompt: Prompt, name: str = MODEL) -> list[Any]:
    return out(prompt.add("UNETLoader", unet_name=name, weight_dtype="default"))


def parallel_model(prompt: Prompt, name: str = MODEL, **settings: Any) -> list[Any]:
    return out(prompt.add("LoadParallelMMDiT", model_name=name, mesh=mesh(prompt, **settings)))


def picture(prompt: Prompt, node: str, model: list[Any], name: str, **settings: Any) -> str:
    """A whole small graph behind `model`; the id of the node that saves its latent."""
    positive, negative = conditioning(prompt, 1, 154), conditioning(prompt, 2, settings.pop("negative_tokens", 77))
    empty = out(prompt.add("EmptySD3LatentImage", width=settings.pop("width", 160), height=96, batch_size=1))
    return save_latent(prompt, sampler(prompt, node, model, positive, negative, empty, **settings), name)


@pytest.fixture(scope="module")
def local(server: ComfyServer) -> Tensor:
    prompt = Prompt()
    node = picture(prompt, "KSampler", local_model(prompt), "local")
    return latent_of(server, server.run(prompt.nodes), node)


@pytest.mark.parametrize("node", ["ParallelSampler", "KSampler"])
@pytest.mark.parametrize("degrees", [{}, {"cfg": 1, "ulysses": 2}, {"cfg": 1, "ring": 2}, {"cfg": 1, "tp": 2}], ids=str)
def test_latent_equals_a_local_models(node: str, degrees: dict[str, int], server: ComfyServer, local: Tensor) -> None:
    prompt = Prompt()
    saved = picture(prompt, node, parallel_model(prompt, **degrees), "parallel")
    latent = latent_of(server, server.run(prompt.nodes), saved)
    torch.testing.assert_close(latent, local, rtol=1e-4, atol=1e-4)


def advanced(prompt: Prompt, model: list[Any], name: str) -> str:
    """SamplerCustomAdvanced with a CFGGuider on a shifted model, from a random latent."""
    shifted = out(prompt.add("ModelSamplingSD3", model=model, shift=5.0))
    guider = prompt.add(
        "CFGGuider", model=shifted, positive=conditioning(prompt, 1), negative=conditioning(prompt, 2), cfg=3.0
    )
    sigmas = prompt.add("BasicScheduler", model=shifted, scheduler="karras", steps=3, denoise=0.7)
    latent = prompt.add("ProbeRandomLatent", seed=1, channels=16, height=14, width=10)
    done = prompt.add(
        "SamplerCustomAdvanced",
        noise=out(prompt.add("RandomNoise", noise_seed=3)),
        guider=out(guider),
        sampler=out(prompt.add("KSamplerSelect", sampler_name="dpmpp_2m")),
        sigmas=out(sigmas),
        latent_image=out(latent),
    )
    return save_latent(prompt, out(done), name)


def test_guiders_and_model_sampling_run_on_a_parallel_model(server: ComfyServer) -> None:
    latents = []
    for load in (local_model, parallel_model):
        prompt = Prompt()
        node = advanced(prompt, load(prompt), load.__name__)
        latents.append(latent_of(server, server.run(prompt.nodes), node))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)


def test_guidance_nodes_are_known_under_the_names_that_a_server_gives_their_modules(server: ComfyServer) -> None:
    latents = []
    for load in (local_model, parallel_model):
        prompt = Prompt()
        rescaled = out(prompt.add("RescaleCFG", model=load(prompt), multiplier=0.6))
        model = out(prompt.add("APG", model=rescaled, eta=0.7, norm_threshold=5.0, momentum=0.0))
        node = picture(prompt, "KSampler", model, f"apg {load.__name__}", steps=2)
        outcome = server.run(prompt.nodes)
        latents.append(latent_of(server, outcome, node))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)
    assert any("the whole loop in the backend" in text for texts in outcome.texts.values() for text in texts)


def test_parallel_sampler_takes_the_shift_of_model_sampling(server: ComfyServer) -> None:
    latents = []
    for node, load in (("KSampler", local_model), ("ParallelSampler", parallel_model)):
        prompt = Prompt()
        shifted = out(prompt.add("ModelSamplingSD3", model=load(prompt), shift=5.0))
        saved = picture(prompt, node, shifted, node, steps=4, scheduler="normal")
        latents.append(latent_of(server, server.run(prompt.nodes), saved))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)


def test_mask_and_image_to_image(server: ComfyServer) -> None:
    latents = []
    for node, load in (("KSampler", local_model), ("ParallelSampler", parallel_model)):
        prompt = Prompt()
        latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=14, width=10))
        half = out(prompt.add("SolidMask", value=1.0, width=40, height=112))
        whole = out(prompt.add("SolidMask", value=0.0, width=80, height=112))
        mask = out(prompt.add("MaskComposite", destination=whole, source=half, x=0, y=0, operation="add"))
        masked = out(prompt.add("SetLatentNoiseMask", samples=latent, mask=mask))
        positive, negative = conditioning(prompt, 1), conditioning(prompt, 2)
        done = sampler(
            prompt, node, load(prompt), positive, negative, masked, denoise=0.7, sampler_name="euler_ancestral"
        )
        saved = save_latent(prompt, done, node)
        latents.append(latent_of(server, server.run(prompt.nodes), saved))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)


def test_the_status_route_tells_of_the_backend_and_free_frees_it(server: ComfyServer, local: Tensor) -> None:
    prompt = Prompt()
    node = picture(prompt, "ParallelSampler", parallel_model(prompt), "freed")
    server.run(prompt.nodes)

    def models() -> list[str]:
        (state,) = (b for b in server.get("/parallel_mmdit/status")["backends"] if b["name"] == "comfy")
        assert state["refused"] == 0 and len(state["ranks"]) == 2
        return [model["name"] for model in state["models"]]

    assert MODEL in models()
    server.post("/free", {})
    assert MODEL in models()
    server.post("/free", {"unload_models": True})
    wait_until(lambda: not models(), 30)
    outcome = server.run(prompt.nodes)
    torch.testing.assert_close(latent_of(server, outcome, node), local, rtol=1e-4, atol=1e-4)


def test_a_comfyui_that_is_killed_leaves_the_backend_in_order_and_the_next_reads_no_weight(
    server: ComfyServer, local: Tensor, runtime_folder: Path
) -> None:
    prompt = Prompt()
    picture(prompt, "ParallelSampler", parallel_model(prompt), "before", steps=1)
    server.run(prompt.nodes)  # the model is there, whatever was freed before
    prompt = Prompt()
    picture(prompt, "ParallelSampler", parallel_model(prompt), "killed", steps=1000)
    server.post("/prompt", {"prompt": prompt.nodes})
    backend = Backend.attach("comfy")
    wait_until(lambda: backend.status().running == "Sample", 30)
    server.kill()
    wait_until(lambda: not backend.status().running, 30)
    server.begin()
    server.wait()
    prompt = Prompt()
    model = parallel_model(prompt)
    node = picture(prompt, "ParallelSampler", model, "after")
    outcome = server.run(prompt.nodes)
    torch.testing.assert_close(latent_of(server, outcome, node), local, rtol=1e-4, atol=1e-4)
    log = (runtime_folder / "comfy" / "rank0.log").read_text()
    assert backend.status().restarts == 0, log[-3000:]
    assert "weights already resident, 0 bytes read" in outcome.texts[model[0]][-1], log[-3000:]
    backend.close()


def test_a_backend_behind_an_address_gives_a_local_models_latent(
    server: ComfyServer, local: Tensor, models: Path, tmp_path: Path
) -> None:
    address, keys = f"tcp://127.0.0.1:{free_port()}", str(Keys.make(tmp_path / "keys").folder)
    serve = ["serve", "--name", "far", "--world-size", "2", "--device", "cpu", "--detach", "--listen", address]
    serve += ["--keys", keys, "--models", str(models / "diffusion_models")]
    subprocess.run([sys.executable, "-m", "parallel_backend", *serve], check=True, cwd=Path(__file__).parents[1])
    try:
        prompt = Prompt()
        node = picture(prompt, "ParallelSampler", parallel_model(prompt, address=address, keys=keys), "far")
        latent = latent_of(server, server.run(prompt.nodes), node)
        torch.testing.assert_close(latent, local, rtol=1e-4, atol=1e-4)
        prompt = Prompt()
        picture(prompt, "ParallelSampler", parallel_model(prompt, address=address), "no keys")
        assert "can't be used without keys" in server.run(prompt.nodes).message
        prompt = Prompt()
        prompt.add("ProbeCoreMemory", how="unload_all_models")
        server.run(prompt.nodes)  # while somebody answers: later tests would wait for that
    finally:
        Backend.attach("far").stop()


def test_progress_and_previews(server: ComfyServer) -> None:
    prompt = Prompt()
    picture(prompt, "ParallelSampler", parallel_model(prompt), "preview", steps=4, seed=123)
    outcome = server.run(prompt.nodes, preview=True)
    assert outcome.error is None
    assert outcome.progress[-1] == (4, 4)
    assert outcome.previews >= 4


@pytest.mark.parametrize("node", ["ParallelSampler", "KSampler"])
def test_an_interrupt_ends_the_prompt_and_the_next_one_works(node: str, server: ComfyServer, local: Tensor) -> None:
    prompt = Prompt()
    picture(prompt, node, parallel_model(prompt), "long", steps=200, width=512, seed=77)
    outcome = server.run(prompt.nodes, preview=True, interrupt_at_step=2)
    assert outcome.interrupted
    assert max(value for value, _ in outcome.progress) < 100
    prompt = Prompt()
    saved = picture(prompt, "ParallelSampler", parallel_model(prompt), "after")
    latent = latent_of(server, server.run(prompt.nodes), saved)
    torch.testing.assert_close(latent, local, rtol=1e-4, atol=1e-4)


def test_mesh_config_left_alone_says_what_it_takes(server: ComfyServer) -> None:
    prompt = Prompt()
    link = mesh(prompt, ranks=0, device="auto", dtype="auto")
    prompt.add("LoadParallelMMDiT", model_name=MODEL, mesh=link)
    picture(prompt, "ParallelSampler", ["2", 0], "default")
    outcome = server.run(prompt.nodes)
    assert outcome.error is None
    assert outcome.texts[link[0]] == ["2 ranks on cpu: cfg=2, dtype auto"]


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        (
            {"dp": 0},
            [
                "cfg=2 ulysses=4 (UNet: dp=4 cfg=2)",
                "UNet: ",
                "2 of 8 ranks",
                "other 6 wait",
            ],
        ),
        ({"dp": 1}, ["cfg=2 ulysses=4 (UNet: cfg=2 patch=4)"]),
        ({"dp": 0, "cfg": 1}, ["ulysses=8 (UNet: patch=8)"]),
    ],
    ids=str,
)
def test_the_node_says_which_gpus_a_picture_is_not_worth(
    degrees: dict[str, int], words: list[str], server: ComfyServer
) -> None:
    """Of a backend elsewhere, which is not asked before a model is loaded. Degrees that are set are taken as they are."""
    prompt = Prompt()
    there = {"ranks": 8, "device": "cuda", "address": "tcp://127.0.0.1:1", "keys": "none"}
    link = mesh(prompt, **there | degrees)
    prompt.add("PreviewAny", source=link)
    (text,) = server.run(prompt.nodes).texts[link[0]]
    assert all(word in text for word in words)
    assert ("wait" in text) == (degrees == {"dp": 0})


def refused(server: ComfyServer, prompt: Prompt) -> str:
    """The error's text on the node; afterwards the next prompt must work."""
    outcome = server.run(prompt.nodes)
    assert outcome.error is not None
    after = Prompt()
    node = picture(after, "ParallelSampler", parallel_model(after), "after", seed=hash(outcome.prompt_id) % 1000)
    assert torch.isfinite(latent_of(server, server.run(after.nodes), node)).all()
    return outcome.message


def test_degrees_that_dont_fit_are_said_on_the_node_before_anything_runs(server: ComfyServer) -> None:
    prompt = Prompt()
    picture(prompt, "ParallelSampler", parallel_model(prompt, tp=3), "never")
    text = refused(server, prompt)
    assert "dp=1 * cfg=1 * pp=1 * patch=1 * ring=1 * ulysses=1 * tp=3 = 3, but the backend has 2 ranks" in text


@pytest.mark.parametrize("node", ["ParallelSampler", "KSampler"])
def test_patches_that_cant_be_sent_are_refused_by_name(node: str, server: ComfyServer) -> None:
    prompt = Prompt()
    patched = out(prompt.add("ProbeAttentionPatch", model=parallel_model(prompt)))
    picture(prompt, node, patched, "never")
    assert "the attn1_patch by AttentionPatch.patch.<locals>.<lambda> of probe_nodes" in refused(server, prompt)


def last_words(outcome: Outcome) -> str:
    return "\n".join(text for texts in outcome.texts.values() for text in texts)


@pytest.mark.parametrize("node", ["ParallelSampler", "KSampler"])
def test_the_node_says_whether_the_backend_runs_the_loop_and_what_keeps_it_from_that(
    node: str, server: ComfyServer
) -> None:
    prompt = Prompt()
    picture(prompt, node, parallel_model(prompt), "whole", seed=41)
    assert "s a step, the whole loop in the backend" in last_words(server.run(prompt.nodes))
    prompt = Prompt()
    guided = out(prompt.add("Mahiro", model=parallel_model(prompt)))
    picture(prompt, node, guided, "guided", seed=41)
    assert "step by step: model option 'sampler_post_cfg_function'" in last_words(server.run(prompt.nodes))


def test_displaced_steps_are_made_under_any_sampler_whose_loop_the_backend_runs(server: ComfyServer) -> None:
    latents, settings = [], {"cfg": 1, "ring": 2}
    for asked, node in ((False, "KSampler"), (True, "KSampler"), (True, "ParallelSampler")):
        prompt = Prompt()
        model = parallel_model(prompt, **settings)
        if asked and node == "KSampler":
            model = out(prompt.add("DisplacedSteps", model=model, warmup_steps=2))
        more = {"displaced": True, "warmup_steps": 2} if node == "ParallelSampler" else {}
        saved = picture(prompt, node, model, "displaced", steps=5, **more)
        latents.append(latent_of(server, server.run(prompt.nodes), saved))
    assert (latents[1] - latents[0]).abs().max() > 1e-4
    torch.testing.assert_close(latents[2], latents[1], rtol=1e-4, atol=1e-4)

    prompt = Prompt()
    displaced = out(prompt.add("DisplacedSteps", model=parallel_model(prompt, **settings), warmup_steps=2))
    picture(prompt, "KSampler", out(prompt.add("Mahiro", model=displaced)), "never")
    assert "Displaced steps can't honour model option 'sampler_post_cfg_function'" in refused(server, prompt)


def test_a_step_cache_is_had_under_any_sampler_whose_loop_the_backend_runs(server: ComfyServer) -> None:
    usual = {"method": "first_block", "threshold": 0.7, "interval": 2, "first_steps": 1, "last_steps": 1}
    latents, words = [], []
    for changes, node in (({"threshold": 0.0}, "KSampler"), ({}, "KSampler"), ({"method": "auto"}, "ParallelSampler")):
        prompt = Prompt()
        cached = out(prompt.add("ParallelStepCache", model=parallel_model(prompt), **usual | changes))
        saved = picture(prompt, node, cached, "cached", steps=8)
        outcome = server.run(prompt.nodes)
        latents.append(latent_of(server, outcome, saved))
        words.append(last_words(outcome))
    prompt = Prompt()
    saved = picture(prompt, "KSampler", parallel_model(prompt), "exact", steps=8)
    exact = latent_of(server, server.run(prompt.nodes), saved)
    assert torch.equal(latents[0], exact) and "step cache (first_block): 0 of 8 evaluations reused" in words[0]
    assert (latents[1] - exact).abs().max() > 1e-4 and " 0 of 8 evaluations" not in words[1] and "reused" in words[1]
    torch.testing.assert_close(latents[2], latents[1], rtol=1e-4, atol=1e-4)

    prompt = Prompt()
    cached = out(prompt.add("ParallelStepCache", model=parallel_model(prompt), **usual))
    picture(prompt, "KSampler", out(prompt.add("Mahiro", model=cached)), "never")
    assert "A step cache can't honour model option 'sampler_post_cfg_function'" in refused(server, prompt)


@pytest.mark.parametrize("node", ["ParallelSampler", "KSampler"])
def test_nan_ends_a_prompt_where_mesh_config_says_so(node: str, server: ComfyServer) -> None:
    prompt = Prompt()
    empty = out(prompt.add("EmptySD3LatentImage", width=160, height=96, batch_size=1))
    bad, model = conditioning(prompt, 1, 77, nan=True), parallel_model(prompt, nan_is_error=True)
    save_latent(prompt, sampler(prompt, node, model, bad, conditioning(prompt, 2), empty), "x")
    assert "The positive conditioning that came in holds NaN" in refused(server, prompt)


def test_a_latent_of_other_channels_is_named(server: ComfyServer) -> None:
    prompt = Prompt()
    latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=4, height=16, width=16))
    done = sampler(
        prompt, "ParallelSampler", parallel_model(prompt), conditioning(prompt, 1), conditioning(prompt, 2), latent
    )
    save_latent(prompt, done, "never")
    assert "needs (batch, 16," in refused(server, prompt)


def test_an_unknown_sampler_is_refused(server: ComfyServer) -> None:
    prompt = Prompt()
    picture(prompt, "ParallelSampler", parallel_model(prompt), "never", sampler_name="dpm_slow")
    assert "sampler_name" in refused(server, prompt)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.safetensors", "it is cut short or damaged"),
        ("pickled.safetensors", "it is a pickle"),
        ("foreign.safetensors", "is a VAE"),
    ],
)
def test_damaged_and_foreign_files_are_named(name: str, words: str, server: ComfyServer, models: Path) -> None:
    folder = models / "diffusion_models"
    (folder / "cut.safetensors").write_bytes((folder / MODEL).read_bytes()[:1_000_000])
    torch.save({"weight": torch.zeros(3)}, folder / "pickled.safetensors")
    (folder / "foreign.safetensors").write_bytes((models / "vae" / "sd3_vae.safetensors").read_bytes())
    prompt = Prompt()
    picture(prompt, "ParallelSampler", parallel_model(prompt, name), "never")
    text = refused(server, prompt)
    assert name in text and words in text


@pytest.mark.parametrize("vae", ["sd3_vae.safetensors", "taesd3"])
def test_the_vae_decodes_and_encodes_as_stock_nodes_expect(vae: str, server: ComfyServer) -> None:
    prompt = Prompt()
    parallel = out(prompt.add("PatchParallelVAE", vae_name=vae, mesh=mesh(prompt)))
    latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=21, width=13))
    image = out(prompt.add("VAEDecode", samples=latent, vae=parallel))
    tiled = out(
        prompt.add(
            "VAEDecodeTiled",
            samples=latent,
            vae=parallel,
            tile_size=64,
            overlap=16,
            temporal_size=64,
            temporal_overlap=8,
        )
    )
    saved = [prompt.add("SaveImage", images=i, filename_prefix="decoded") for i in (image, tiled)]
    encoded = save_latent(prompt, out(prompt.add("VAEEncode", pixels=image, vae=parallel)), "encoded")
    outcome = server.run(prompt.nodes)
    assert latent_of(server, outcome, encoded).shape == (1, 16, 21, 13)
    assert all(outcome.outputs[node]["images"] for node in saved)


def test_taesd_equals_the_stock_loaders(server: ComfyServer) -> None:
    latents = []
    for loader in ("VAELoader", "PatchParallelVAE"):
        prompt = Prompt()
        more = {} if loader == "VAELoader" else {"mesh": mesh(prompt)}
        vae = out(prompt.add(loader, vae_name="taesd3", **more))
        latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=21, width=13))
        image = out(prompt.add("VAEDecode", samples=latent, vae=vae))
        node = save_latent(prompt, out(prompt.add("VAEEncode", pixels=image, vae=vae)), loader)
        latents.append(latent_of(server, server.run(prompt.nodes), node))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)


def test_help_pages_and_tooltips_are_there(server: ComfyServer) -> None:
    loaders = ("LoadParallelMMDiT", "LoadParallelCheckpoint", "ParallelizeModel", "ParallelizeVAE")
    for node in (*loaders, "MeshConfig", "ParallelSampler", "PatchParallelVAE"):
        info = server.get(f"/object_info/{node}")[node]
        inputs = [spec for group in info["input"].values() for spec in group.values()]
        assert inputs and all(len(spec) > 1 and spec[1].get("tooltip") for spec in inputs), node
        assert server.get_text(f"/extensions/parallel-mmdit/docs/{node}.md").startswith(f"# {info['display_name']}")


def test_a_from_scratch_model_samples_in_the_backend_and_under_ksampler_alike(
    server: ComfyServer, models: Path
) -> None:
    write_pickle(models / "diffusion_models" / "scratch")
    latents = []
    for node in ("ParallelSampler", "KSampler"):
        prompt = Prompt()
        positive, negative = (conditioning(prompt, seed, 154, width=2304, pooled=32) for seed in (1, 2))
        latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=14, width=10))
        model = parallel_model(prompt, "scratch/model_ema_10s.pkl")
        done = sampler(prompt, node, model, positive, negative, latent, denoise=0.8, steps=4)
        saved = save_latent(prompt, done, node)
        latents.append(latent_of(server, server.run(prompt.nodes), saved))
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-4, atol=1e-4)
