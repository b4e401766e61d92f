"""A MODEL of a real ComfyUI and its parallel twin, side by side: twins.py COMFYUI PACK BACKEND FOLDER CASES...

Each of CASES is the name of a module beside this file with `MODELS`, files and meshes by name, and `cases(twins)`, which yields (name of the
model, name of the case, what to do to a MODEL, settings of the sampling). Prints as JSON, by model and case: how far the parallel
latent is from the local one, how far that is from the plain model's, and what the node said.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
import time
import traceback

import packs
import shims
import torch

# So many pairs are held at a time.
PAIRS = 4
# What a case may set of a sampling that ParallelSampler, too, is told.
OF_NODE = {"steps", "cfg", "sampler", "positive", "negative", "noise_mask"}


class Twins:
    """The two MODELs of each file, and what is made of them."""

    def __init__(self, comfy_folder, pack, backend, folder):
        shims.start_core(comfy_folder)
        import comfy.sample
        import comfy.samplers
        import comfy.sd
        import comfy.supported_models

        comfy.supported_models.models.extend(shims.narrow_sdxl(comfy.supported_models))
        torch.set_num_threads(1)
        self.comfy, self.comfy_folder, self.folder = comfy, comfy_folder, folder
        spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py", submodule_search_locations=[pack])
        sys.modules["pack"] = importlib.util.module_from_spec(spec)
        (
            self.core_dtype,
            self.core_memory,
            self.remote_model,
            self.parallel_sampler,
            self.whole_loop,
            backends,
            self.errors,
        ) = (
            importlib.import_module(f"pack.{part}")
            for part in (
                "nodes.core_dtype",
                "nodes.core_memory",
                "nodes.remote_model",
                "nodes.parallel_sampler",
                "nodes.whole_loop",
                "parallel_backend",
                "parallel_backend.errors",
            )
        )
        self.backend, self.mesh = backends.Backend.attach(backend), backends.MeshSpec
        self.said = []
        self.whole_loop.say = lambda text, **_: self.said.append(text)
        self._models = {}

    def pair(self, name, file, mesh, options=None):
        """(local, parallel), loaded once; `options` are a loader's, and `has_fp8`."""
        if name not in self._models:
            if len(self._models) == PAIRS:
                del self._models[next(iter(self._models))]
            path = os.path.join(self.folder, file)
            dtype, in_fp8 = "float32", {}
            if options is not None:
                dtype = self.core_dtype.told_by_loader(options)
                in_fp8 = self.core_dtype.fp8_products(options) | {"has_fp8": bool(options.pop("has_fp8", False))}
            self.comfy.model_management.SUPPORT_FP8_OPS = in_fp8.get("has_fp8", False)
            local = self.local(path, options)
            self.comfy.model_management.SUPPORT_FP8_OPS = False
            remote = self.backend.load_model(path, self.mesh(**mesh), dtype, **in_fp8)
            pathlike = importlib.import_module("pathlib").Path(path)
            self._models[name] = local, self.remote_model.remote_patcher(remote, pathlike, 1)
        return self._models[name]

    def local(self, path, options=None):
        """ComfyUI's own MODEL, of a GGUF file that of the pack ComfyUI-GGUF, and of NF4, which neither reads, one of its values."""
        if os.path.basename(path).startswith("nf4"):
            path = os.path.join(self.folder, "values", os.path.basename(path))
        if not path.endswith(".gguf"):
            return self.comfy.sd.load_diffusion_model(path, model_options=options or {"dtype": torch.float32})
        folder_paths = importlib.import_module("folder_paths")
        folder_paths.folder_names_and_paths["diffusion_models"] = ([os.path.dirname(path)], {".gguf"})
        nodes = packs.part_of_pack(os.path.join(self.comfy_folder, "custom_nodes", "ComfyUI-GGUF"), "nodes")
        return nodes.UnetLoaderGGUF().load_unet(os.path.basename(path))[0]

    def prompt(self, model, seed, tokens=24, **options):
        """Random CONDITIONING of the widths that the model takes."""
        context, pooled = (4096, 2048) if type(model.model).__name__ == "SD3" else (2048, 1280)
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(1, tokens, context, generator=generator)
        return [[tensor, {"pooled_output": torch.randn(1, pooled, generator=generator), **options}]]

    def latent(self, model, rows=8, columns=6):
        channels = model.model.latent_format.latent_channels
        return torch.randn(1, channels, rows, columns, generator=torch.Generator().manual_seed(9))

    def distance(self, model, latent, expected):
        """As a share of the largest value, or as the model sees latents where these are small."""
        latent, expected = (model.model.process_latent_in(x) for x in (latent, expected))
        return float((latent - expected).abs().max() / expected.abs().max().clamp(min=1))

    def sample(self, model, *, steps=2, cfg=3.0, sampler="euler", scheduler="simple", seed=5, **more):
        """KSampler's latent; `positive`, `negative`, `latent` and sample's own settings may be given."""
        latent = more.pop("latent", None)
        latent = self.latent(model) if latent is None else latent
        positive, negative = more.pop("positive", None), more.pop("negative", None)
        prompts = positive or self.prompt(model, 1), negative or self.prompt(model, 2)
        noise = self.comfy.sample.prepare_noise(latent, seed)
        more = {"denoise": 0.8, "seed": seed, "disable_pbar": True} | more
        return self.comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, *prompts, latent, **more)

    def by_parallel_sampler(self, model, latent, positive, negative):
        """ParallelSampler's latent, and KSampler's of a local MODEL."""
        pair = {"positive": positive, "negative": negative, "latent_image": latent}
        settings = {
            "seed": 5,
            "steps": 2,
            "cfg": 3.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 0.8,
        }
        if not isinstance(model, self.remote_model.RemotePatcher):
            return importlib.import_module("nodes").KSampler().sample(model, **settings, **pair)[0]["samples"]
        return self.parallel_sampler.ParallelSampler.execute(model, **settings, **pair).result[0]["samples"]

    def sample_by_node(self, model, *, steps=2, cfg=3.0, sampler="euler", **more):
        """As `sample`, a parallel MODEL's by ParallelSampler."""
        if not isinstance(model, self.remote_model.RemotePatcher):
            return self.sample(model, steps=steps, cfg=cfg, sampler=sampler, **more)
        settings = {
            "seed": 5,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": sampler,
            "scheduler": "simple",
            "denoise": 0.8,
        }
        prompts = {
            kind: more.get(kind) or self.prompt(model, seed) for kind, seed in (("positive", 1), ("negative", 2))
        }
        latent = {"samples": self.latent(model), "noise_mask": more.get("noise_mask")}
        out = self.parallel_sampler.ParallelSampler.execute(model, **settings, **prompts, latent_image=latent)
        return out.result[0]["samples"]

    def outcome(self, models, run, change, settings, plain):
        """What comes of a case, on the local MODEL and on the parallel one; `plain`: the latent of the local MODEL as it is."""
        self.said.clear()
        latents = []
        try:
            for model in models:
                latents.append(run(change(model), **settings))
        except Exception as error:  # noqa: BLE001 - told to the test, by case
            text = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
            refused = isinstance(error, self.errors.BackendError)
            return {
                "error": text,
                "failed": ("local", "parallel")[len(latents)],
                "refused": error.message if refused else None,
            }
        local, parallel = latents
        effect = self.distance(models[0], local, plain) if local.shape == plain.shape else 1.0
        said = self.said[-1] if self.said else ""
        return {"far": self.distance(models[0], parallel, local), "effect": effect, "said": said}


def call(node, *args, **inputs):
    """A node's first output, of either of ComfyUI's kinds of node."""
    if hasattr(node, "define_schema"):
        done = node.execute(*args, **inputs)
        return (done if isinstance(done, tuple) else done.result)[0]
    return getattr(node(), node.FUNCTION)(*args, **inputs)[0]


def main(comfy_folder, pack, backend, folder, *names):
    logging.disable(logging.WARNING)
    twins, outcomes, plain = Twins(comfy_folder, pack, backend, folder), {}, {}
    with torch.inference_mode():
        modules = [importlib.import_module(name) for name in names]
        for module, name, case, change, settings in ((m, *found) for m in modules for found in m.cases(twins)):
            models = twins.pair(name, *module.MODELS[name])
            started = time.process_time()
            if name not in plain:
                plain[name] = twins.sample(models[0])
            run = settings.pop("of", twins.sample)
            outcome = twins.outcome(models, run, change, settings, plain[name])
            if os.environ.get("TWINS_BY_NODE") and run == twins.sample and settings.keys() <= OF_NODE:
                outcome["by_node"] = twins.outcome(models, twins.sample_by_node, change, settings, plain[name])
            outcomes.setdefault(name, {})[case] = outcome
            print(f"{time.process_time() - started:6.2f} s {name} {case}", file=sys.stderr, flush=True)
    twins.backend.close()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
