"""NaN, infinity, odd sizes and short memory on a real ComfyUI's MODEL and VAE and on their parallel twins: odd_values.py COMFYUI PACK MODELS
BACKENDS...

Prints as JSON, by model, backend and case: whether both gave NaN and infinity at the same places and equal values elsewhere, how many there were, and what
the node said.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
from pathlib import Path

import torch
from twins import Twins, call

NAN, INF = float("nan"), float("inf")
# Cases that are run once more as errors.
REFUSED = ("NaN in a latent", "NaN in weights", "NaN in weights step by step")


def compared(ours, expected):
    alike = torch.allclose(ours, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    return {"alike": bool(alike), "odd": int((~torch.isfinite(expected)).sum()), "all": expected.numel()}


def spoiled(x, value, row=-1):
    """`x` with that value in one cell of a row."""
    x = x.clone()
    x[row, 0, 2, 1] = value
    return x


# -- sampling ---------------------------------------------------------------------------------------------------------


def broken(model):
    """The MODEL with a patch that makes NaN of a weight, and the name of its network's first product."""
    name = next(key for key in model.model.state_dict() if key.endswith(("to_q.weight", "x_block.attn.qkv.weight")))
    patched = model.clone()
    patched.add_patches({name: ("diff", (torch.full(model.model.state_dict()[name].shape, NAN),))})
    return patched


def two_rows(latent):
    return torch.cat([latent, latent.flip(2)])


def sampling_cases(twins, model):
    latent = twins.latent(model)
    yield "NaN in a latent", {"latent": spoiled(latent, NAN)}
    yield "infinity in a latent, denoise 1", {"latent": spoiled(latent, INF), "denoise": 1.0}
    yield "infinity in one of two latents", {"latent": spoiled(two_rows(latent), INF)}
    yield "minus infinity step by step", {"latent": spoiled(two_rows(latent), -INF), "sampler": "euler_cfg_pp"}
    mask = torch.ones(1, 1, 8, 6)
    mask[..., :4, :] = 0
    yield "NaN below a mask", {"latent": spoiled(latent, NAN), "noise_mask": mask}
    yield "NaN in a mask", {"noise_mask": spoiled(mask, NAN)}
    prompt = twins.prompt(model, 1)
    prompt[0][0] = prompt[0][0].clone()
    prompt[0][0][0, 3, 7] = NAN
    yield "NaN in a prompt", {"positive": prompt}
    yield "NaN in weights", {"change": broken}
    yield "NaN in weights step by step", {"change": broken, "sampler": "euler_cfg_pp"}


def refused(run):
    """How the prompt ends where NaN is an error."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - told to the test
        return f"{type(error).__name__}: {error}"
    return ""


def samplings(twins, local, parallel, cases):
    """What each of the parallel MODELs gives, by their worlds and case."""
    outcomes = {world: {} for world in parallel}
    for case, settings in cases:
        change = settings.pop("change", lambda model: model)
        expected = twins.sample(change(local), **settings)
        for world, model in parallel.items():
            run = functools.partial(twins.sample, change(model), **settings)
            twins.said.clear()
            outcomes[world][case] = compared(run(), expected) | {"said": list(twins.said)}
            if case in REFUSED:
                model.remote.nan_is_error = True
                outcomes[world][case]["refused"] = refused(run)
                model.remote.nan_is_error = False
    return outcomes


# -- VAE --------------------------------------------------------------------------------------------------------------


def vae_pair(folder, backends):
    """TAESD 3 of ComfyUI's own, and in the backends."""
    import comfy.sd
    from safetensors.torch import load_file

    files = [Path(folder) / "vae_approx" / f"taesd3_{part}.safetensors" for part in ("encoder", "decoder")]
    weights = {f"taesd_{file.stem[7:]}.{name}": x for file in files for name, x in load_file(file).items()}
    weights |= {"vae_scale": torch.tensor(1.5305), "vae_shift": torch.tensor(0.0609)}
    remote_vae = importlib.import_module("pack.nodes.remote_vae")
    parallel = {
        world: remote_vae.ParallelVAE(backend.load_vae(files, "float32"), 1) for world, backend in backends.items()
    }
    return comfy.sd.VAE(sd=weights, dtype=torch.float32), parallel


def vae_cases():
    import nodes

    generator = torch.Generator().manual_seed(3)
    latent, image = torch.randn(2, 16, 12, 10, generator=generator), torch.rand(1, 67, 45, 3, generator=generator)
    bad = image.clone()
    bad[0, 20, 30, 1] = NAN
    inpaint = {"pixels": image, "mask": (torch.rand(1, 67, 45, generator=generator) > 0.7).float(), "grow_mask_by": 6}
    tiles = {"pixels": image, "tile_size": 64, "overlap": 16}
    return {
        "decode NaN": lambda vae: vae.decode(spoiled(latent, NAN)),
        "decode infinity": lambda vae: vae.decode(spoiled(latent, INF)),
        "decode NaN in tiles": lambda vae: vae.decode_tiled(spoiled(latent, NAN), tile_x=8, tile_y=8, overlap=2),
        "encode NaN": lambda vae: vae.encode(bad),
        "encode odd sizes": lambda vae: vae.encode(image),
        "encode odd sizes in tiles": lambda vae: call(nodes.VAEEncodeTiled, vae=vae, **tiles)["samples"],
        "inpaint odd sizes": lambda vae: call(nodes.VAEEncodeForInpaint, vae=vae, **inpaint)["samples"],
        "inpaint odd sizes, mask": lambda vae: call(nodes.VAEEncodeForInpaint, vae=vae, **inpaint)["noise_mask"],
    }


def vaes(twins, local, parallel):
    outcomes = {world: {} for world in parallel}
    for case, run in vae_cases().items():
        expected = run(local)
        for world, vae in parallel.items():
            twins.said.clear()
            outcomes[world][case] = compared(run(vae), expected) | {"said": list(twins.said)}
            if case == "decode NaN":
                vae.remote.nan_is_error = True
                outcomes[world][case]["refused"] = refused(functools.partial(run, vae))
                vae.remote.nan_is_error = False
    # Larger than a tile; ComfyUI's own take long, and are the same for all.
    latent = torch.randn(1, 16, 66, 34, generator=torch.Generator().manual_seed(5))
    image = torch.rand(1, 528, 275, 3, generator=torch.Generator().manual_seed(5))
    tiled = local.decode_tiled(latent), local.encode_tiled(image)
    for world, vae in parallel.items():
        outcomes[world] |= short_of_memory(twins, vae, latent, image, *tiled)
    return outcomes


def short_of_memory(twins, parallel, latent, image, decoded, encoded):
    """Decode and encode where a rank has no memory for its band of the whole."""
    errors = importlib.import_module("pack.parallel_backend.errors")
    outcomes, own = {}, parallel.remote._request

    def request(body, attachments, **callbacks):
        if attachments[0].tensor.shape[1:] in (latent.shape[1:], image[:, :, 1:273].shape[1:]):
            raise errors.OutOfMemoryError("Rank 1 on cpu is out of memory: 2 MiB more.")
        return own(body, attachments, **callbacks)

    parallel.remote._request = request
    for case, run, expected in (
        ("decode", lambda: parallel.decode(latent), decoded),
        ("encode", lambda: parallel.encode(image), encoded),
    ):
        twins.said.clear()
        outcomes[f"{case} without memory"] = compared(run(), expected) | {"said": list(twins.said)}
    parallel.remote._request = own
    return outcomes


def main(comfy_folder, pack, folder, *names):
    logging.disable(logging.WARNING)
    models = os.path.join(folder, "diffusion_models")
    twins = Twins(comfy_folder, pack, names[0], models)
    for part in ("remote_network", "remote_vae"):
        importlib.import_module(f"pack.nodes.{part}").say = lambda text, **_: twins.said.append(text)
    backends = {name: type(twins.backend).attach(name) for name in names}
    outcomes = {}
    with torch.inference_mode():
        for file, axis in (("sd3.5-medium.safetensors", "ulysses"), ("unet-tiny.safetensors", "patch")):
            path = Path(models) / file
            local = twins.comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
            parallel = {
                name: twins.remote_model.remote_patcher(
                    backend.load_model(path, twins.mesh(**{axis: backend.world_size}), "float32"), path, 1
                )
                for name, backend in backends.items()
            }
            cases = list(sampling_cases(twins, local))
            outcomes[file] = samplings(twins, local, parallel, cases if file.startswith("sd3") else cases[2:4])
        outcomes["vae"] = vaes(twins, *vae_pair(folder, backends))
    for backend in [twins.backend, *backends.values()]:
        backend.close()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
