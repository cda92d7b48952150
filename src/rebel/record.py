"""Keeps the record of a run: rows, samples, checkpoints, the best policy; hears signals and callbacks that end it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch

from rebel import checkpoint
from rebel.checkpoint import Progress
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.evaluate import Evaluation, text
from rebel.iterates import Iterates
from rebel.learner import Learner
from rebel.report import Terminal, append_rows, read_rows, truncate_after
from rebel.rewards.functions import RewardFailed
from rebel.run_folder import BEST, FAILED, IMAGES, METRICS, SAMPLES, SETTINGS
from rebel.settings import dump
from rebel.signals import heeding_signals
from rebel.trackers import Trackers, is_number

SMALL = 192
"""Pixels of the longer side of a picture's copy for the report."""

FREE = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "iterations",
        "max_steps",
        "rounds",
        "num_train_epochs",
        "anchor_cache_dir",
        "tokens_per_micro_batch",
        "images_per_micro_batch",
        "judge_funcs",
        "shared_prefix",
        "activation_offloading",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "eval_against",
        "eval_judge",
        "reference_column",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "resume_from_checkpoint",
        "report_to",
        "run_name",
        "disable_tqdm",
        "push_to_hub",
        "hub_model_id",
        "use_cpu",
        "max_failed_rewards",
        "judge_base_url",
        "judge_api_key_env",
        "judge_concurrency",
        "judge_deadline",
        "mixture",
        "vllm_server_base_url",
        "vllm_weights_dir",
        "vllm_deadline",
        "vllm_gpu_memory_utilization",
        "vllm_enable_sleep_mode",
        "vllm_max_mismatch",
    ]
)
"""Settings that may differ when a run is resumed: they do not change what is learnt."""


def fingerprint(config: RebelConfig) -> str:
    """The settings that decide what is learnt, for comparison with those of a checkpoint."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE}
    return json.dumps(values, sort_keys=True, default=str)


@dataclass
class Recorder:
    """The hooks of a run in a folder. `round` is the number of iterations of a round, if there are rounds."""

    config: RebelConfig
    folder: Path
    terminal: Terminal
    trackers: Trackers
    learner: Learner
    save_model: Callable[[Path], None]
    prompts: int
    noted: Callable[[], dict[str, float]] = dict
    iterates: Iterates | None = None
    round: int = 0
    signalled: str | None = None
    evaluated: int = -1
    logged: int = -1
    saved: int = -1
    rng: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    unseen: list[dict[str, Any]] = field(default_factory=list)
    """Rows since the last that was logged."""
    end: int = -1
    """Optimiser steps of the whole run."""

    @property
    def main(self) -> bool:
        return self.learner.accelerator.is_main_process

    def begin(self, progress: Progress, steps: int) -> None:
        """Note the settings, and cut off what a resumed run had reported beyond its checkpoint."""
        if self.main:
            (self.folder / SETTINGS).write_text(dump(self.config))
            for name in (METRICS, SAMPLES):
                truncate_after(self.folder / name, progress.iteration if progress.step else -1)
            if self.iterates:
                self.iterates.begin(progress.iteration)
        self.evaluated = self.logged = self.saved = progress.step
        self.end = steps
        self.rng = checkpoint.rng_state()
        former = read_rows(self.folder / METRICS) if self.main and progress.step else []
        self.trackers.begin(progress.step, steps, former, self.best_value(progress))

    def phase(self, name: str, total: int) -> AbstractContextManager:
        return self.terminal.phase(name, total)

    def iterated(self, progress: Progress) -> None:
        """An iteration has ended: tell callbacks, and keep its policy if it is one of those of the mixture."""
        self.trackers.step(progress.step, progress.prompts_taken / self.prompts)
        if self.iterates and self.main:
            self.iterates.keep(progress.iteration)
        self.learner.accelerator.wait_for_everyone()

    def evaluation_is_due(self, progress: Progress) -> bool:
        wanted = self.config.eval_strategy == "steps" and due(self.evaluated, progress.step, self.config.eval_steps)
        return wanted or self.trackers.control.should_evaluate

    def report(self, progress: Progress, metrics: dict[str, float], evaluation: Evaluation | None) -> None:
        """Write the row of an iteration, tell the trackers, and keep a checkpoint if it is time to."""
        where = {"iteration": progress.iteration, "step": progress.step, "samples": progress.samples}
        evaluated = {**evaluation.metrics, "eval/policy": evaluation.policy} if evaluation else {}
        self.last = where | metrics | where | evaluated  # first in the row, and nobody's to change
        if self.main:
            append_rows(self.folder / METRICS, [self.last])
        self.unseen.append(self.last)
        if evaluation or self.log_is_due(progress):
            self.log(progress)
        if evaluation:
            self.take_evaluation(progress, evaluation)
        self.rng = checkpoint.rng_state()
        if self.checkpoint_is_due(progress):
            self.checkpoint(progress)

    def log_is_due(self, progress: Progress) -> bool:
        """As often as asked, and at the end."""
        wanted = due(self.logged, progress.step, self.config.logging_steps) or progress.step == self.end
        return wanted or self.trackers.control.should_log

    def log(self, progress: Progress) -> None:
        """Show the mean of the rows since the last time."""
        row = mean_row(self.unseen)
        self.logged, self.unseen = progress.step, []
        self.terminal.row(row)
        self.trackers.log(row)

    def checkpoint_is_due(self, progress: Progress) -> bool:
        """Also before a round: what it draws belongs to the policy as it is then, and to no other."""
        before_round = self.round > 0 and progress.iteration % self.round == 0
        wanted = before_round or due(self.saved, progress.step, self.config.save_steps)
        return (wanted and self.config.save_strategy == "steps") or self.trackers.control.should_save

    def take_evaluation(self, progress: Progress, evaluation: Evaluation) -> None:
        """Write its samples and keep the policy if it is the best so far."""
        self.evaluated = progress.step
        if self.main:
            rows = [{"iteration": progress.iteration, **row} for row in evaluation.samples]
            self.trackers.pictures([row["image"] for row in rows if "image" in row])
            append_rows(self.folder / SAMPLES, with_files(rows, self.folder))
        self.trackers.evaluated(evaluation.metrics)
        if not self.better(progress, evaluation):
            return
        keep = self.config.load_best_model_at_end
        if keep and self.main:
            self.keep_best()
        self.trackers.best(self.best_value(progress), self.folder / BEST if keep else None)

    def better(self, progress: Progress, evaluation: Evaluation) -> bool:
        """Whether this evaluation is the best so far, by the metric that tells; notes it down."""
        name = self.config.best_metric
        if name not in evaluation.metrics:
            if not (self.config.load_best_model_at_end or self.config.metric_for_best_model):
                return False
            raise RebelError(f"--metric_for_best_model {name} is none of {', '.join(evaluation.metrics)}")
        value = evaluation.metrics[name] * self.sign
        if progress.best is not None and value <= progress.best:
            return False
        progress.best = value
        return True

    def best_value(self, progress: Progress) -> float | None:
        """The metric of the best evaluation."""
        return None if progress.best is None else progress.best * self.sign

    @property
    def sign(self) -> int:
        return 1 if self.config.larger_is_better else -1

    def keep_best(self) -> None:
        """Write the policy as the best so far, with its weights to go back to."""
        self.save_model(self.folder / BEST)
        with self.learner.use_average():
            checkpoint.save_weights(self.learner.weights, self.folder / BEST)

    def go_back_to_best(self) -> None:
        """The policy of the best evaluation again, if it was kept."""
        if self.config.load_best_model_at_end and (self.folder / BEST).exists():
            checkpoint.load_weights(self.learner.weights, self.folder / BEST)
            self.learner.averaged = []  # which is what was evaluated, where one is kept

    def checkpoint(self, progress: Progress) -> None:
        """Write what resumes the run; skipped while the learner is in the middle of an iteration."""
        if progress.step != self.learner.steps:
            return
        progress.settings = fingerprint(self.config)
        if self.main and not (self.saved == progress.step and self.checkpoint_folder(progress).exists()):
            checkpoint.save(self.folder, self.learner, self.save_model, progress, self.rng)
            checkpoint.prune(self.folder, self.config.save_total_limit)
        if self.saved != progress.step:
            self.saved = progress.step
            self.trackers.saved()
        self.learner.accelerator.wait_for_everyone()

    def checkpoint_folder(self, progress: Progress) -> Path:
        return self.folder / f"{checkpoint.PREFIX}{progress.step}"

    def stop(self) -> bool:
        """Whether a signal or a callback asks for the end; all processes hear of it at once."""
        asked = [self.signalled is not None, self.trackers.should_stop]
        accelerator = self.learner.accelerator
        if accelerator.num_processes > 1:
            own = torch.tensor(asked, device=accelerator.device).float()
            summed: Any = accelerator.reduce(own, reduction="sum")
            asked = summed.tolist()
        if asked[0] and self.signalled is None:
            self.signalled = "a signal to another process"
        return any(asked)

    def write_failure(self, failure: RewardFailed) -> Path:
        """What a reward function was called with when it raised."""
        cases = [{"prompt": text(p.content), "completion": text(c.content), **dict(p.meta)} for p, c in failure.cases]
        row = {"function": failure.name, "error": repr(failure.__cause__), "cases": cases}
        path = self.folder / FAILED
        path.write_text(json.dumps(row, indent=2, default=str))
        return path

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run at the next safe place; a second one ends it at once."""

        def hear(name: str) -> None:
            self.signalled = name
            self.terminal.say(f"{name}: stopping at the next safe place; once more to stop at once")

        with heeding_signals(hear):
            yield


LATEST = ("iteration", "step", "samples", "eta", "learning_rate")
"""Numbers of a row that tell where a run stands."""


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last row, with the means of what is measured in every iteration."""
    last = rows[-1]
    kept = [name for name in last if name in LATEST or name.startswith("eval/") or not is_number(last[name])]
    means = {name: mean(row[name] for row in rows if is_number(row.get(name))) for name in last if name not in kept}
    return last | means


def with_files(rows: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows with the pictures among them written to files, which they then name."""
    return [
        {**row, "image": write_picture(row["image"], folder, f"{row['iteration']:06d}-{k:03d}")}
        if "image" in row
        else row
        for k, row in enumerate(rows)
    ]


def write_picture(image: Any, folder: Path, name: str) -> str:
    """The picture as a PNG file of the run, with a small copy for the report. Returns its name within the folder."""
    (folder / IMAGES).mkdir(exist_ok=True)
    image.save(folder / IMAGES / f"{name}.png")
    if max(image.size) > SMALL:
        small = folder / IMAGES / "small"
        small.mkdir(exist_ok=True)
        copy = image.copy()
        copy.thumbnail((SMALL, SMALL))
        copy.save(small / f"{name}.png")
    return f"{IMAGES}/{name}.png"


def due(last: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies beyond `last` and not beyond `now`."""
    return now // every > last // every
