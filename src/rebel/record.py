"""Keeps the record of a run: rows, samples, checkpoints, the best policy; hears signals and callbacks that end it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from rebel import checkpoint
from rebel.checkpoint import Progress
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.evaluate import Evaluation, text
from rebel.iterates import FOLDER as ITERATES
from rebel.iterates import Iterates
from rebel.learner import Learner
from rebel.report import Terminal, append_rows, truncate_after
from rebel.rewards.functions import RewardFailed
from rebel.samplers.server import PREFIX as SENT
from rebel.settings import dump
from rebel.signals import heeding_signals
from rebel.trackers import Trackers

METRICS, SAMPLES, SETTINGS, FAILED = "metrics.jsonl", "samples.jsonl", "config.yaml", "failed_reward.json"
BEST, ROUNDS, IMAGES = "best", "rounds", "images"
SMALL = 192
"""Pixels of the longer side of a picture's copy for the report."""

OPPONENTS = "eval_opponents.jsonl"
MODEL = ("config.json", "adapter_config.json", "model_index.json", "model.safetensors", "adapter_model.safetensors")
"""Files by which a saved model is known, whoever made it."""
LEFTOVERS = (METRICS, SAMPLES, SETTINGS, FAILED, "report.html", "opponents.jsonl")

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


def claim_folder(config: RebelConfig, resume: bool) -> Path:
    """The output folder, made if need be. One that holds another run is an error unless it is to be overwritten."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RebelError(f"--output_dir {folder} is a file; name a folder")
    model = config.model_name_or_path or config.pipeline_name_or_path
    if model and folder.resolve() == Path(model).resolve():
        raise RebelError(f"--output_dir {folder} is the model's own folder; the tuned model would replace it")
    held = [name for name in (*LEFTOVERS, ROUNDS) if (folder / name).exists()] + checkpoint.all_checkpoints(folder)
    if held and not resume:
        if not config.overwrite_output_dir:
            raise RebelError(
                f"--output_dir {folder} holds another run: go on with it by --resume, replace it by "
                "--overwrite_output_dir, or name another folder"
            )
        clear(folder)
    model = [name for name in MODEL if (folder / name).exists()]
    if model and not held:
        raise RebelError(f"--output_dir {folder} holds a model that is not of `rebel train` ({model[0]}); name another")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear(folder: Path) -> None:
    """Delete what a run of rebel left, and nothing else."""
    for name in (*LEFTOVERS, OPPONENTS, *MODEL):
        (folder / name).unlink(missing_ok=True)
    weights = folder.glob(f"{SENT}*")
    kept = [folder / name for name in (BEST, ITERATES, ROUNDS, IMAGES)]
    for old in [*checkpoint.all_checkpoints(folder), *kept, *weights]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoint_to_resume(config: RebelConfig) -> Path | None:
    """The checkpoint that --resume names: a folder, or the latest one of the output folder."""
    asked = config.resume_from_checkpoint
    if not asked:
        return None
    if asked is not True and str(asked).lower() not in ("true", "latest"):
        if not Path(str(asked)).is_dir():
            raise RebelError(f"--resume {asked}: there is no such folder")
        return Path(str(asked))
    found = checkpoint.all_checkpoints(Path(config.output_dir))
    if not found:
        raise RebelError(f"--resume: --output_dir {config.output_dir} has no checkpoint to go on from")
    return found[-1]


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
        self.rng = checkpoint.rng_state()
        self.trackers.begin(progress.step, steps)

    def phase(self, name: str, total: int) -> AbstractContextManager:
        return self.terminal.phase(name, total)

    def iterated(self, progress: Progress) -> None:
        """An iteration has ended: keep its policy if it is one of those of the mixture."""
        if self.iterates and self.main:
            self.iterates.keep(progress.iteration)
        self.learner.accelerator.wait_for_everyone()

    def evaluation_is_due(self, progress: Progress) -> bool:
        return self.config.eval_strategy == "steps" and due(self.evaluated, progress.step, self.config.eval_steps)

    def report(self, progress: Progress, metrics: dict[str, float], evaluation: Evaluation | None) -> None:
        """Write the row of an iteration, tell the trackers, and keep a checkpoint if it is time to."""
        where = {"iteration": progress.iteration, "step": progress.step, "samples": progress.samples}
        evaluated = {**evaluation.metrics, "eval/policy": evaluation.policy} if evaluation else {}
        self.last = {**where, **metrics, **self.noted(), **evaluated}
        if self.main:
            append_rows(self.folder / METRICS, [self.last])
        self.trackers.step(progress.step, progress.prompts_taken / self.prompts)
        if evaluation or due(self.logged, progress.step, self.config.logging_steps):
            self.logged = progress.step
            self.terminal.row(self.last)
            self.trackers.log(self.last)
        if evaluation:
            self.take_evaluation(progress, evaluation)
        self.rng = checkpoint.rng_state()
        if self.config.save_strategy == "steps" and self.checkpoint_is_due(progress):
            self.checkpoint(progress)

    def checkpoint_is_due(self, progress: Progress) -> bool:
        """Also before a round: what it draws belongs to the policy as it is then, and to no other."""
        before_round = self.round > 0 and progress.iteration % self.round == 0
        return before_round or due(self.saved, progress.step, self.config.save_steps)

    def take_evaluation(self, progress: Progress, evaluation: Evaluation) -> None:
        """Write its samples and keep the policy if it is the best so far."""
        self.evaluated = progress.step
        if self.main:
            rows = [{"iteration": progress.iteration, **row} for row in evaluation.samples]
            self.trackers.pictures([row["image"] for row in rows if "image" in row])
            append_rows(self.folder / SAMPLES, with_files(rows, self.folder))
        self.trackers.evaluated(evaluation.metrics)
        if self.config.load_best_model_at_end and self.better(progress, evaluation) and self.main:
            self.save_model(self.folder / BEST)

    def better(self, progress: Progress, evaluation: Evaluation) -> bool:
        """Whether this evaluation is the best so far; notes it down."""
        name = self.config.best_metric
        if name not in evaluation.metrics:
            raise RebelError(f"--metric_for_best_model {name} is none of {', '.join(evaluation.metrics)}")
        value = evaluation.metrics[name] * (1 if self.config.greater_is_better else -1)
        if progress.best is not None and value <= progress.best:
            return False
        progress.best = value
        return True

    def checkpoint(self, progress: Progress) -> None:
        """Write what resumes the run; skipped while the learner is in the middle of an iteration."""
        if progress.step != self.learner.steps:
            return
        progress.settings = fingerprint(self.config)
        if self.main and not (self.saved == progress.step and self.checkpoint_folder(progress).exists()):
            checkpoint.save(self.folder, self.learner, self.save_model, progress, self.rng)
            checkpoint.prune(self.folder, self.config.save_total_limit)
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
