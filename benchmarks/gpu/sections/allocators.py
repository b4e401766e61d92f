"""Torch's ways to get memory from the driver: a step's time, and what stays reserved when sizes change."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from parallel_backend.bench.device_time import timed
from parallel_backend.distributed.stale import EXACT

from ..options import ROOT, Options
from ..report import NO_GPU, Report
from ..sizes import CELL, Sizes, sizes_of
from ..weights import mmdit_predictor, mmdit_tensors, sd3_prompts

SETTINGS = {
    "as it comes": "",
    "expandable segments": "expandable_segments:True",
    "cudaMallocAsync": "backend:cudaMallocAsync",
}
# (height, width) in pixels and text tokens of one prompt after the other, as users change them.
ROUND = [(1024, 1024, 154), (832, 1216, 154), (768, 768, 77), (1344, 768, 231), (1024, 1024, 154)]
GIB = 2**30


def run(report: Report, options: Options) -> None:
    report.table(
        "SD3.5-Large by allocator, after images of several sizes",
        *("allocator", "ms a step", "of the host", "GiB allocated at the peak", "GiB taken from the card"),
    )
    if options.device != "cuda":
        report.row("all", NO_GPU)
        return
    for name, setting in SETTINGS.items():
        both = {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
        env = {key: value for key, value in os.environ.items() if key not in both} | (both if setting else {})
        command = [sys.executable, "-m", __name__, *(["--tiny"] if options.tiny else [])]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            report.row(name, f"fails with status {done.returncode}; the log has why")
        else:
            report.row(name, *json.loads(done.stdout.splitlines()[-1]))


@torch.inference_mode()
def measured(sizes: Sizes) -> list[float]:
    device = torch.device("cuda", 0)
    before = torch.cuda.mem_get_info()[0]
    dtype = sizes.dtypes[0]
    predictor = mmdit_predictor(mmdit_tensors(sizes.mmdit, device, dtype), sizes.mmdit, device, dtype)
    timestep = torch.tensor(500.0)
    for height, width, text in ROUND:
        x = torch.randn(1, sizes.mmdit.channels, height // CELL, width // CELL, device=device)
        prompts = sd3_prompts(text, device, dtype)
        share = predictor.share(len(x), prompts)
        predictor.outputs(x, timestep, share, EXACT)
    spent = timed(lambda: predictor.outputs(x, timestep, share, EXACT), device, sizes.warm_up, sizes.repeats)
    taken = before - torch.cuda.mem_get_info()[0]
    return [spent.whole, spent.host, torch.cuda.max_memory_allocated() / GIB, taken / GIB]


if __name__ == "__main__":
    print(json.dumps(measured(sizes_of(Options("cuda", "--tiny" in sys.argv, ROOT)))))
