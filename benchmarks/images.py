"""Forms of REBEL and PPO-clip (DDPO) on real handwritten digits, at equal reward queries.

python benchmarks/images.py tune [--part 0/2]     # every form at seven points, on a seed that is not reported
python benchmarks/images.py run [--part 0/2]      # every form at its best point, on five other seeds
python benchmarks/images.py jpeg                  # a reward that destroys what it is given, without and with a price
python benchmarks/images.py pictures --quickstart FOLDER     # docs/pictures/digits-*.png of that quickstart
python benchmarks/images.py table                 # results/images.md and .png from the rows

Rows are in results/images.jsonl, and runs whose rows are there are skipped. A part 0/2 makes those of every
other form: two processes share the work.
"""

from __future__ import annotations

import argparse
import functools
import math
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from rebel.config import RebelConfig
from rebel.job import quiet, run_training
from rebel.report import append_rows, read_rows
from rebel.run_folder import METRICS
from rebel.tasks.digits import RECIPE, prepare, settings
from rebel.trackers import mosaic
from rebel.validate import validate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = RESULTS / "images.jsonl"
PICTURES = ROOT / "docs" / "pictures"
TUNED_ON, SEEDS = 100, (0, 1, 2, 3, 4)
BUDGETS = (2560, 5120)
FAST = 3e-3
RATES = (1e-3, 3e-4, FAST)
TRIED = {"eta": (20.0, 5.0, 80.0), "clip_range": (0.2, 0.05, 0.5)}
"""Every form is tried with each value at each learning rate; at the highest, where most fail, with the first alone."""
OFF = 1e6

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """A form of the method, with the settings it has in any case; `knob` is what it is tuned by beside the rate."""

    name: str
    fixed: Mapping[str, Any]
    colour: str
    knob: str = "eta"
    values: Sequence[float] = TRIED["eta"]
    dashed: bool = False


COMMON: dict[str, Any] = {
    "beta": 0.0,
    "track_kl": False,
    "steps_per_iteration": 4,
    "num_iterations": 1,
    "eval_steps": 40,
}
"""Four optimiser steps on each iteration's 128 images, whatever the form; what the quickstart does need not be this."""

PAIRS = {"num_generations": 2, "prompts_per_iteration": 64, "credit": "trajectory", "scale_rewards": "batch"}
ALL = {"num_generations": 8, "prompts_per_iteration": 16, "scale_rewards": "group"}
"""Rewards are divided by their standard deviation in all forms, as PPO's are: that of the prompt's images; of the
iteration's where a prompt has two, which would leave nothing but a sign."""
STEP, TRAJECTORY = ALL | {"credit": "step"}, ALL | {"credit": "trajectory"}
PPO = TRAJECTORY | {"algorithm": "ppo_clip", "eta": "auto", "scale_rewards": "none"}
FORMS = (
    Form("PPO-clip (DDPO)", PPO, "#c2571a", "clip_range", TRIED["clip_range"]),
    Form("REBEL, all pairs, per step", STEP, "#2f8f5b"),
    Form("REBEL, all pairs", TRAJECTORY, "#1763a6"),
    Form("REBEL, pairs (the paper's)", PAIRS, "#8fb8de"),
    Form("REBEL, per step, eta 1e6 (off)", STEP, "#8c96a0", values=[OFF], dashed=True),
    Form("REBEL, pairs, same noise", PAIRS | {"same_noise": True}, "#8fb8de", dashed=True),
    Form("REBEL, all pairs, eta 1e6 (off)", TRAJECTORY, "#8c96a0", values=[OFF]),
)


def base(work: Path) -> Path:
    """The folder with the model that all runs begin with, and the prompts; made where it is not there yet."""
    folder = work / "digits"
    if not (folder / "prompts").exists():
        prepare(folder, RECIPE, seed=42)
    return folder


def finish_one(work: Path, part: str, form: str, seed: int, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One run; its row is added to the file, and its evaluations are returned."""
    folder, began = work / f"run-{part}-{time.time_ns()}", time.perf_counter()
    start = base(work)
    given = {"pipeline_name_or_path": str(start / "initial"), "dataset_name": str(start / "prompts"), **changes}
    run_training(validate(RebelConfig(**{**vars(settings(folder, seed)), **COMMON, **given})))
    curve = [evaluated(row) for row in read_rows(folder / METRICS) if row.get("eval/reward") is not None]
    row = {"part": part, "form": form, "seed": seed, "changes": dict(changes), "curve": curve}
    append_rows(ROWS, [{**row, "seconds": round(time.perf_counter() - began, 1), "commit": commit()}])
    if part == "jpeg":
        keep_pictures(folder, "digits-before", f"jpeg-{form.replace(' ', '-')}")
    shutil.rmtree(folder)
    return curve


def evaluated(row: Row) -> dict[str, Any]:
    return {
        "samples": row["samples"],
        "reward": row["eval/reward"],
        "judge": row["eval/judges/svm_accuracy"],
        "kl": row.get("eval/kl_initial"),
    }


@functools.cache
def commit() -> str:
    """What this process runs, from its start."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def rows(part: str, form: str | None = None) -> list[dict[str, Any]]:
    """Rows of the file, the first of those that two processes made at the same time."""
    found = [row for row in read_rows(ROWS) if row["part"] == part and form in (None, row["form"])]
    return list({str((row["form"], row["seed"], row["changes"])): row for row in reversed(found)}.values())[::-1]


def score(row: Row) -> float:
    """What a point is chosen by: the judge at both budgets. The reward alone prefers points that exploit it."""
    return fmean(value_at(row, budget, "judge") for budget in BUDGETS)


def value_at(row: Row, samples: int, key: str) -> float:
    return next(point[key] for point in row["curve"] if point["samples"] == samples)


def best(form: Form) -> dict[str, Any]:
    """The point of its grid at which a form did best on the seed of the tuning."""
    return dict(max(rows("tune", form.name), key=score)["changes"])


def points(form: Form) -> Iterator[dict[str, Any]]:
    """What a form is tried at."""
    for rate in RATES:
        for value in form.values if rate != FAST else form.values[:1]:
            yield {**form.fixed, "learning_rate": rate, form.knob: value}


def there(part: str, form: Form, seed: int, changes: Mapping[str, Any]) -> bool:
    return any(row["changes"] == changes and row["seed"] == seed for row in rows(part, form.name))


def make(part: str, work: Path, share: str, forms: int) -> None:
    """The runs of every so many-th of the first forms that the file does not have yet."""
    number, of = map(int, share.split("/"))
    for form in FORMS[:forms][number::of]:
        if part == "run" and not rows("tune", form.name):  # not tuned yet
            continue
        for changes in points(form) if part == "tune" else [best(form)]:
            for seed in (TUNED_ON,) if part == "tune" else SEEDS:
                if not there(part, form, seed, changes):
                    print(f"\n== {part}: {form.name}, seed {seed}, {changes}", flush=True)
                    finish_one(work, part, form.name, seed, changes)


# -- a reward that destroys --------------------------------------------------------------------------------------------

JPEG: dict[str, Any] = {
    "reward_funcs": ["jpeg_compressibility"],
    "credit": "step",
    "num_generations": 8,
    "prompts_per_iteration": 16,
    "learning_rate": 3e-4,
    "eta": 100.0,
    "track_kl": True,
}
PRICES = (0.05, 0.0)
"""beta, in kilobytes per nat."""


def jpeg(work: Path) -> None:
    for beta in PRICES:
        form = f"beta {beta:g}"
        if not rows("jpeg", form):
            finish_one(work, "jpeg", form, 42, {**JPEG, "beta": beta})


def keep_pictures(folder: Path, before: str, after: str) -> None:
    """The first 20 drawings of a run before and after, as they are in the documentation."""
    files = sorted((folder / "images").glob("*.png"))
    iterations = sorted({file.name[:6] for file in files})
    for iteration, name in ((iterations[0], before), (iterations[-1], after)):
        shown = [Image.open(file) for file in files if file.name.startswith(iteration)][:20]
        write_mosaic(shown, PICTURES / f"{name}.png")


def write_mosaic(shown: Sequence[Image.Image], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    framed = [Image.new("L", (36, 36), 90) for _ in shown]
    for frame, image in zip(framed, shown, strict=True):
        frame.paste(image, (2, 2))
    Image.fromarray(mosaic(framed)[:, :, 0].astype(np.uint8)).resize((720, 144), Image.Resampling.NEAREST).save(path)


# -- the table and the picture -----------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def reported(form: Form) -> list[dict[str, Any]]:
    """The runs of a form at its best point."""
    return [row for row in rows("run", form.name) if row["changes"] == {**form.fixed, **best(form)}]


def in_words(form: Form) -> str:
    point = best(form)
    value = f"clip {point['clip_range']:g}" if "clip_range" in point else f"eta {point['eta']:g}"
    return f"lr {point['learning_rate']:g}" + ("" if point.get("eta") == OFF else f", {value}")


def table() -> list[str]:
    """A row for each form: its best point, reward and judge at both budgets, mean over seeds with standard error."""
    heads = [f"{what} at {budget:,}" for budget in BUDGETS for what in ("reward", "judge")]
    lines = ["| form | at | seeds | " + " | ".join(heads) + " |", "| --- | --- | --- |" + " --- |" * len(heads)]
    for form in FORMS:
        found = reported(form)
        if not found:
            continue
        numbers = [
            "{:.3f} ± {:.3f}".format(*mean_and_error([value_at(row, budget, key) for row in found]))
            for budget in BUDGETS
            for key in ("reward", "judge")
        ]
        lines.append(f"| {form.name} | {in_words(form)} | {len(found)} | " + " | ".join(numbers) + " |")
    return lines


def grid_table() -> list[str]:
    """Reward at both budgets of every point that was tried, on the seed of the tuning."""
    lines = [
        "| form | lr | eta or clip | reward at 2,560 | reward at 5,120 | judge at 5,120 |",
        "| --- |" + " --- |" * 5,
    ]
    for form in FORMS:
        for row in sorted(rows("tune", form.name), key=score, reverse=True):
            changes = row["changes"]
            value = changes["clip_range"] if "clip_range" in changes else changes["eta"]
            numbers = [value_at(row, budget, "reward") for budget in BUDGETS] + [value_at(row, 5120, "judge")]
            shown = " | ".join(f"{number:.3f}" for number in numbers)
            lines.append(f"| {form.name} | {changes['learning_rate']:g} | {value:g} | {shown} |")
    return lines


def jpeg_table() -> list[str]:
    lines = ["| beta | kilobytes before | after | judge before | after | KL to the initial model, nats |"]
    lines.append("| --- |" + " --- |" * 5)
    for row in rows("jpeg"):
        first, last = row["curve"][0], row["curve"][-1]
        lines.append(
            f"| {row['changes']['beta']:g} | {-first['reward']:.3f} | {-last['reward']:.3f} | {first['judge']:.3f} | "
            f"{last['judge']:.3f} | {last['kl']:.1f} |"
        )
    return lines


def draw() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for form in FORMS:
        found = reported(form)
        for axis, key in zip(axes, ("reward", "judge"), strict=True):
            samples = [point["samples"] for point in found[0]["curve"]] if found else []
            values = [mean_and_error([value_at(row, at, key) for row in found]) for at in samples]
            style: dict[str, Any] = {"color": form.colour, "ls": "--" if form.dashed else "-", "lw": 1.4}
            axis.errorbar(samples, [v for v, _ in values], [e for _, e in values], label=form.name, **style)
    axes[0].set(xlabel="reward queries", ylabel="reward: log-probability of the digit (logistic regression)")
    axes[1].set(xlabel="reward queries", ylabel="held-out judge: accuracy (support vector machine)")
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "images.png", dpi=110)


def write_table() -> None:
    parts = [table(), grid_table(), jpeg_table()]
    titles = ["Five seeds", f"The grid, seed {TUNED_ON}", "JPEG compressibility as the reward, 5,120 queries, one seed"]
    lines = [line for title, part in zip(titles, parts, strict=True) for line in (f"## {title}", "", *part, "")]
    (RESULTS / "images.md").write_text("# Digits, at equal reward queries\n\n" + "\n".join(lines))
    draw()
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "run", "jpeg", "table", "pictures"])
    parser.add_argument("--part", default="0/1", help="which of how many processes that share the work this is")
    parser.add_argument("--forms", type=int, default=len(FORMS), help="only so many of the forms, in their order")
    parser.add_argument("--quickstart", type=Path, help="for pictures: the folder of a `rebel quickstart images`")
    parser.add_argument("--work", type=Path, default=Path("images-work"), help="folder of the runs, and of the model")
    arguments = parser.parse_args()
    quiet()
    commit()
    if arguments.what == "table":
        write_table()
    elif arguments.what == "pictures":
        keep_pictures(arguments.quickstart, "digits-before", "digits-after")
    elif arguments.what == "jpeg":
        jpeg(arguments.work)
    else:
        make(arguments.what, arguments.work, arguments.part, arguments.forms)


if __name__ == "__main__":
    main()
