"""The table and the picture of all runs in results/frontier.jsonl: reward against KL and against samples.

python benchmarks/ours.py grid && python benchmarks/peers.py grid     # the runs; those already made are skipped
python benchmarks/frontier.py                                         # results/frontier.md and .png from them
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import matplotlib
import story

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = Mapping[str, Any]
Point = tuple[float, float]
OFF = "#8c96a0"
COLOURS = {"rebel": "#1763a6", "grpo": "#c2571a", "rloo": "#4d8f3a"}
STRETCHES = "#8a2f9e"
FARTHEST = 30.0
"""KL in nats beyond which the pictures show nothing: by then a story is one word over and over."""


def name(run: Row) -> str:
    """A method with the settings in which its runs differ from others of the same benchmark."""
    s = run["settings"]
    parts = [run["method"].upper()]
    if run["method"] == "rebel":
        parts.append("eta 1e6 (off)" if s["eta"] == 1e6 else f"eta {s['eta']}")
        parts += ["by stretches"] if by_stretches(run) else []
        parts += [f"KL held at {s['kl_per_iteration']:g}"] if s["kl_per_iteration"] else []
        parts += [f"average {s['average']:g}"] if s["average"] else []
        parts += ["clipped at 1"] if s["max_grad_norm"] == 1 else []
        batch = (s["steps"], s["passes"])
    else:
        parts += ["group scale"] if s["scale_rewards"] == "group" else []
        parts += [f"price {s['price']}"] if s.get("price", "trl") != "trl" and s["beta"] else []
        batch = (s["steps_per_generation"], s["num_iterations"])
    parts.append(f"lr {s['learning_rate']:g}")
    parts += [f"{batch[0]} x {batch[1]} steps"] if batch != (8, 1) else []
    return ", ".join(parts)


def former(run: Row) -> bool:
    """Whether it was made by a rule of eta: auto that was given up; such rows stay in the file for the notes."""
    return str(run["settings"].get("eta", "")).startswith(("auto ", "auto,"))


def grouped(task: str, prompts: int, beta: float) -> dict[str, list[Row]]:
    """Runs of one setting by name."""
    found: dict[str, list[Row]] = defaultdict(list)
    for run in story.read_runs():
        s = run["settings"]
        if (run["task"], s["prompts"], s["beta"]) == (task, prompts, beta) and not former(run):
            found[name(run)].append(run)
    return dict(sorted(found.items()))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def at(runs: Sequence[Row], samples: int) -> list[Row]:
    return [point for run in runs for point in run["curve"] if point["samples"] == samples]


def cell(runs: Sequence[Row], samples: int, beta: float, task: str) -> str:
    """`reward ± error at KL`, and the fraction of the regularised gain where there is a price."""
    points = at(runs, samples)
    if not points:
        return ""
    reward, error = mean_and_error([p["reward"] for p in points])
    text = f"{reward:.3f} ± {error:.3f} at {fmean(p['kl'] for p in points):.2f}"
    if not beta:
        return text
    gain, spread = mean_and_error([story.regularised_gain(p["reward"], p["kl"], beta, task) for p in points])
    return f"{text}: {gain:.0%} ± {spread:.0%}"


def table(task: str, prompts: int, beta: float, milestones: Sequence[int]) -> list[str]:
    """A row for each method, a column for each number of samples."""
    head = (
        f"| {task}, {prompts} x 8, beta {beta:g} | seeds | " + " | ".join(f"{m:,} samples" for m in milestones) + " |"
    )
    lines = [head, "| --- | --- |" + " --- |" * len(milestones)]
    for label, runs in grouped(task, prompts, beta).items():
        cells = " | ".join(cell(runs, samples, beta, task) for samples in milestones)
        lines.append(f"| {label} | {len(runs)} | {cells} |")
    return lines


def reward_at(runs: Sequence[Row], kl: float, most_samples: int) -> list[float]:
    """Reward of each run where its curve, from the initial policy on, crosses this KL, interpolated."""
    start = {"kl": 0.0, "reward": float(story.initial_rewards(runs[0]["task"]).mean()), "samples": 0}
    found = []
    for run in runs:
        curve = [start, *(p for p in run["curve"] if p["samples"] <= most_samples)]
        crossing = [(a, b) for a, b in pairwise(curve) if a["kl"] <= kl <= b["kl"]]
        if crossing:
            a, b = crossing[0]
            share = (kl - a["kl"]) / max(b["kl"] - a["kl"], 1e-9)
            found.append(a["reward"] + share * (b["reward"] - a["reward"]))
    return found


def duel(task: str, prompts: int) -> list[str]:
    """REBEL's reward at the KL that GRPO has after as many samples, beside GRPO's."""
    groups = grouped(task, prompts, 0.0)
    bar = groups.get("GRPO, lr 0.0001", [])
    lines = ["| at GRPO's KL after | KL | GRPO | " + " | ".join(k for k in groups if k.startswith("REBEL")) + " |"]
    lines.append("| --- | --- | --- |" + " --- |" * sum(k.startswith("REBEL") for k in groups))
    for samples in (320, 640):
        points = at(bar, samples)
        if not points:
            continue
        kl = fmean(p["kl"] for p in points)
        reward, error = mean_and_error([p["reward"] for p in points])
        cells = []
        for label, runs in groups.items():
            if label.startswith("REBEL"):
                values = reward_at(runs, kl, samples)
                mean, spread = mean_and_error(values) if values else (math.nan, math.nan)
                cells.append(f"{mean:.3f} ± {spread:.3f} ({len(values)} of {len(runs)} seeds get there)")
        lines.append(f"| {samples} samples | {kl:.2f} | {reward:.3f} ± {error:.3f} | " + " | ".join(cells) + " |")
    return lines


def colour(run: Row) -> str:
    """Grey without the regression; credit by stretches apart from that to whole completions."""
    if run["settings"].get("eta") == 1e6:
        return OFF
    return STRETCHES if by_stretches(run) else COLOURS[run["method"]]


def by_stretches(run: Row) -> bool:
    return run["settings"].get("credit") in ("auto", "stretch")


def draw(task: str, prompts: int, beta: float, axes: Any) -> None:
    """Reward against KL on the left, against samples on the right; the exact optimum as the limit."""
    line = story.optimum_line(task)
    axes[0].plot([p["kl"] for p in line], [p["reward"] for p in line], color="black", lw=1, label="exact optimum")
    for number, (label, runs) in enumerate(grouped(task, prompts, beta).items()):
        samples = sorted({p["samples"] for run in runs for p in run["curve"]})
        points = [(s, fmean(p["kl"] for p in at(runs, s)), fmean(p["reward"] for p in at(runs, s))) for s in samples]
        points = [point for point in points if point[1] <= FARTHEST]
        style = {
            "color": colour(runs[0]),
            "ls": ["-", "--", ":", "-."][number % 4],
            "marker": ".",
            "lw": 1.3,
        }
        axes[0].plot([p[1] for p in points], [p[2] for p in points], label=f"{label} ({len(runs)})", **style)
        axes[1].plot([p[0] for p in points], [p[2] for p in points], **style)
    axes[0].set(
        xlabel="KL to the initial policy (nats per completion)", ylabel="reward", title=f"{task}, beta {beta:g}"
    )
    axes[1].set(xlabel="completions drawn", xscale="log", title=f"{prompts} prompts x 8 an iteration")
    axes[0].legend(fontsize=6, frameon=False)


def main() -> None:
    settings = sorted({(r["task"], r["settings"]["prompts"], r["settings"]["beta"]) for r in story.read_runs()})
    figure, axes = plt.subplots(len(settings), 2, figsize=(11, 4.2 * len(settings)), squeeze=False)
    lines: list[str] = []
    for (task, prompts, beta), pair in zip(settings, axes, strict=True):
        milestones = (1280, 2560, 5120) if beta else (128, 320, 640, 1280)
        lines += [*table(task, prompts, beta, milestones), ""]
        lines += [] if beta else [*duel(task, prompts), ""]
        draw(task, prompts, beta, pair)
    lines = [line.replace(" ± nan%", "").replace(" ± nan", "") for line in lines]  # of one seed
    figure.tight_layout()
    figure.savefig(story.RESULTS / "frontier.png", dpi=110)
    (story.RESULTS / "frontier.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
