"""What the quickstarts have in common: folder, order of events, and settings that fit a few minutes on a CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.job import quiet, run_training
from rebel.run_folder import METRICS, SETTINGS, claim_folder
from rebel.validate import validate

INITIAL = "initial"
"""Within the run's folder: the model that is to be improved."""

HELD_OUT = 1000
SHARED: dict[str, Any] = {
    "dataset_test_split": "test",
    "eval_prompts": HELD_OUT,
    "num_generations": 8,
    "sampling_batch": 1024,
    "num_iterations": 1,
    "logging_steps": 10**9,
    "save_strategy": "no",
    "use_cpu": True,
}


@dataclass(frozen=True, slots=True)
class Show:
    """A quickstart: what is told, and what is done, in this order."""

    teaching: str
    prepare: Callable[[], int]
    """Writes the model that is to be improved and its prompts; the number of the model's parameters."""
    learning: str
    outcome: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    """In words, from the first and the last row of the metrics."""
    report: str
    """What the report shows."""
    prompt: str
    """A prompt to draw from the tuned model, and how, as on the command line."""


def run(show: Show, config: RebelConfig) -> None:
    """The model that is to be improved, REBEL, and what came of it."""
    began, folder = time.monotonic(), Path(config.output_dir)
    config = validate(config, inputs=False)  # which are yet to be made
    make_folder(config)
    quiet()
    print(f"1. {show.teaching}", flush=True)
    parameters = show.prepare()
    print(f"   {parameters:,} parameters, {time.monotonic() - began:.0f} s: {folder / INITIAL}\n")
    print(f"2. {show.learning}\n")
    run_training(config)
    print("\n" + summary(show, folder, time.monotonic() - began))


def make_folder(config: RebelConfig) -> None:
    """The output folder, unless it holds another run."""
    folder = Path(config.output_dir)
    if (folder / SETTINGS).exists() or (folder / METRICS).exists():
        raise RebelError(f"--output_dir {folder} holds another run: delete it, or name another folder")
    claim_folder(config, resume=False)


def write_rows(folder: Path, train: Sequence[Mapping[str, str]], test: Sequence[Mapping[str, str]]) -> None:
    """Both splits as the files of a data set: what `rebel train` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def summary(show: Show, folder: Path, seconds: float) -> str:
    """What came of it, and what to do next."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return "\n".join(
        [
            show.outcome(rows[0], rows[-1]),
            f"All of it took {seconds:.0f} s. Plots, and {show.report} before and after: {folder / 'report.html'}",
            "",
            f"Next:  rebel sample {folder} --prompt {show.prompt}",
            f"       rebel train {folder / SETTINGS} --beta 0.05 --output_dir {folder}-2",
        ]
    )
