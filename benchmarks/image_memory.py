"""Peak memory of an update against the number of denoising steps, one step at a time and with the graph of all of them.

    PYTHONPATH=src python benchmarks/image_memory.py          # about two minutes on a free core

Every cell is a process of its own on the CPU: a random UNet of Stable Diffusion's kind with 6 million weights, 32 x 32
latents, 2 images and classifier-free guidance. Memory is the peak of the resident set, less what there was before the
update. Writes benchmarks/results/image_memory.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from gpu_images import BETAS, clip, commit, tokenizer

from rebel.credit import Known
from rebel.policies.diffusion import diffusion
from rebel.types import LatentTrace

RESULT = Path(__file__).parent / "results" / "image_memory.json"
STEPS = (5, 10, 40)
WHOLE_GRAPH = (5, 10)
IMAGES, SIDE, WIDTH = 2, 32, 64


def pipeline() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
    )
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)  # fmt: skip
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts: Any = (vae, clip(WIDTH), tokenizer(), unet, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def peak() -> float:
    """MiB of the resident set at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(way: str, steps: int) -> dict[str, float]:
    """Peak MiB above what there was before the update."""
    torch.set_num_threads(1)
    made = pipeline()
    source = torch.Generator().manual_seed(1)
    policy = diffusion(made, steps)
    traces = [LatentTrace("a cat", torch.randn(steps + 1, 4, SIDE, SIDE, generator=source)) for _ in range(IMAGES)]
    before = peak()
    began = time.perf_counter()
    if way == "step by step":
        policy.backward(traces, Known(torch.ones(IMAGES)), lambda loss: loss.backward())
    else:
        policy.log_prob(traces).sum().backward()
    return {"MiB": peak() - before, "seconds": time.perf_counter() - began, "before": before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=2, metavar=("WAY", "STEPS"), help="measure one cell in this process")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.cell:
        way, steps = arguments.cell
        print(json.dumps(measured(way, int(steps))))
        return
    cells: dict[str, dict[int, Any]] = {"step by step": {}, "whole graph": {}}
    for way, steps in [("step by step", n) for n in STEPS] + [("whole graph", n) for n in WHOLE_GRAPH]:
        words = [sys.executable, __file__, "--cell", way, str(steps)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        cells[way][steps] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way}, {steps} steps: {cells[way][steps]['MiB']:.0f} MiB", flush=True)
    few, many = (cells["step by step"][n]["MiB"] for n in (STEPS[0], STEPS[-1]))
    result = {"torch": torch.__version__, "commit": commit(), "growth from 5 to 40 steps": many / few, "cells": cells}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"from {STEPS[0]} to {STEPS[-1]} steps: x {many / few:.3f}")


if __name__ == "__main__":
    main()
