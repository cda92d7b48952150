"""How the seconds of an iteration grow with the group, the prompt, the completion and the model, beside a lower bound.

    python benchmarks/cost.py          measures, writes results/cost.json and draws docs/cost.png

An iteration draws, scores and takes one optimiser step on all of its completions: 4 prompts of 128 tokens with 8
completions of 32, a model of width 256, and one of these changed at a time. Processor seconds of one thread, medians
of 3. The bound is made of what no program can avoid, at the rates that this machine has in the same run: operations of
one forward pass to draw and three to regress, each prompt computed once, over the rate of a large product of matrices;
and for drawing at least the bytes of all weights and of every key and value so far for each token, over the bandwidth
of a large copy.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import throughput
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cost.json"
PICTURE = ROOT / "docs" / "cost.png"
BASE = throughput.Work(4, 8, 128, 32, hidden=256, vocabulary=8192)
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "group": ("completions of a prompt", (2, 4, 8, 16, 32)),
    "prompt_length": ("tokens of a prompt", (32, 128, 256, 512)),
    "completion_length": ("tokens of a completion", (16, 32, 64, 128)),
    "hidden": ("width of the model", (64, 128, 256, 512)),
}
LAYERS, INNER = 6, 688


def cpu_seconds(action: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        began = time.process_time()
        action()
        found.append(time.process_time() - began)
    return statistics.median(found)


def rates() -> tuple[float, float]:
    """Operations and bytes per second of one thread, in fp32."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(2**25), torch.empty(2**25)
    a @ b, target.copy_(source)
    copied = 2 * source.numel() * source.element_size()
    return 2 * 2048**3 / cpu_seconds(lambda: a @ b, 7), copied / cpu_seconds(lambda: target.copy_(source), 7)


def forward_operations(work: throughput.Work) -> float:
    """Of one pass over the prompts, each once, and their completions; the output layer where tokens are predicted."""
    layer = 4 * work.hidden**2 + 3 * work.hidden * INNER
    completions, p, c = work.prompts * work.group, work.prompt_length, work.completion_length
    tokens = work.prompts * p + completions * c
    seen = work.prompts * p * (p + 1) / 2 + completions * (c * p + c * (c + 1) / 2)
    return (
        2 * LAYERS * layer * tokens
        + 4 * LAYERS * work.hidden * seen
        + 2 * work.hidden * work.vocabulary * completions * c
    )


def drawn_bytes(work: throughput.Work) -> float:
    """Weights once a token, and the keys and values so far of every completion."""
    weights = LAYERS * (4 * work.hidden**2 + 3 * work.hidden * INNER) + work.hidden * work.vocabulary
    p, c = work.prompt_length, work.completion_length
    own = work.prompts * work.group * c * (c + 1) / 2
    return 4 * (weights * c + 2 * LAYERS * work.hidden * (own + work.prompts * p * c))  # a prompt's own once


def bound(work: throughput.Work, operations: float, bandwidth: float) -> float:
    """Seconds that no program can go below at these rates."""
    forward = forward_operations(work) / operations
    return max(forward, drawn_bytes(work) / bandwidth) + 3 * forward


def measure(work: throughput.Work) -> dict[str, float]:
    """Processor seconds of an iteration, after a warm-up."""
    throughput.ITERATIONS = 3
    with TemporaryDirectory() as folder:
        model, prompts = throughput.model_and_prompts(work, Path(folder) / "model")
        usual, throughput.time.perf_counter = throughput.time.perf_counter, time.process_time
        try:
            seconds = throughput.run_rebel(work, model, prompts, folder)
        finally:
            throughput.time.perf_counter = usual
    return {"seconds": statistics.median(seconds[1:])}


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(13, 3.4), sharey=True)
    for panel, (axis, (label, _)) in zip(panels, AXES.items(), strict=True):
        rows = found["axes"][axis]
        values = [row["value"] for row in rows]
        panel.plot(values, [row["seconds"] for row in rows], "o-", color="#0b6e99", label="an iteration")
        panel.plot(values, [row["bound"] for row in rows], "s--", color="#888888", label="what cannot be avoided")
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
    panels[0].set_ylabel("processor seconds")
    panels[0].set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    operations, bandwidth = rates()
    found: dict[str, Any] = {
        "base": asdict(BASE),
        "gflops": round(operations / 1e9, 1),
        "gbytes_per_second": round(bandwidth / 1e9, 1),
        "axes": {},
    }
    for axis, (label, values) in AXES.items():
        found["axes"][axis] = []
        for value in values:
            work = replace(BASE, **{axis: value})
            row = {"value": value, **measure(work), "bound": bound(work, operations, bandwidth)}
            found["axes"][axis].append(row)
            print(f"{label} {value}: {row['seconds']:.2f} s, at least {row['bound']:.2f}", flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)


if __name__ == "__main__":
    main()
