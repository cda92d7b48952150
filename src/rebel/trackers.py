"""Callbacks and experiment trackers of transformers, called as its Trainer calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy

from rebel.config import RebelConfig
from rebel.errors import RebelError

SHARED = (
    "output_dir",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "use_cpu",
    "report_to",
    "run_name",
    "disable_tqdm",
    "hub_model_id",
    "logging_steps",
    "save_steps",
)


def training_arguments(config: RebelConfig) -> TrainingArguments:
    """The settings as transformers has them, for its optimisers, and all others beside them for callbacks and trackers.

    Those of evaluating and saving are put there afterwards: transformers would refuse some, and does neither here.
    """
    try:
        arguments = TrainingArguments(**{name: getattr(config, name) for name in SHARED}, save_strategy="no")
    except (ValueError, ImportError) as error:  # precision this machine lacks, an unknown optimiser, a missing tracker
        reason = str(error).splitlines()[0]
        flag = next((name for name in ("lr_scheduler_type", "optim") if reason.startswith(getattr(config, name))), None)
        raise RebelError(f"--{flag} {reason}" if flag else f"transformers refuses these settings: {reason}") from error
    others = {name: value for name, value in vars(config).items() if name not in SHARED and value is not None}
    others |= {"metric_for_best_model": config.best_metric.replace("/", "_")}
    others |= {"greater_is_better": config.larger_is_better}
    for name, value in others.items():
        setattr(arguments, name, IntervalStrategy(value) if name.endswith("_strategy") else value)
    shown = arguments.to_dict()
    arguments.to_dict = lambda: {**shown, **others}
    return arguments


class Flow(DefaultFlowCallback):
    """Decides nothing: when to log, evaluate, save and end is the run's own business, and that of other callbacks."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **given: Any) -> TrainerControl:
        return control

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **given: Any) -> TrainerControl:
        return control


def reporting(arguments: TrainingArguments) -> list[TrainerCallback]:
    """The trackers of --report_to, ready to be called."""
    try:
        return [tracker() for tracker in get_reporting_integration_callbacks(arguments.report_to)]
    except (ValueError, RuntimeError, ImportError) as error:  # an unknown one, or one whose package is missing
        names = " ".join(arguments.report_to or [])
        raise RebelError(
            f"--report_to {names}: {str(error).splitlines()[0]} Without it, use --report_to none"
        ) from error


class Trackers:
    """Tells `callbacks` and the trackers of --report_to how a run goes.

    They see the state and the settings, and may ask to log, evaluate and save, and to end the run.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        arguments: TrainingArguments,
        model: Any,
        tokenizer: Any,
        optimizer: Any,
        scheduler: Any,
        main: bool = True,
    ) -> None:
        own = [Flow, *reporting(arguments)]
        self.arguments = arguments
        self.handler = CallbackHandler([*own, *callbacks], model, tokenizer, optimizer, scheduler)
        self.state = TrainerState(is_world_process_zero=main, is_local_process_zero=main)
        self.control = TrainerControl()
        self.handler.on_init_end(self.arguments, self.state, self.control)

    def begin(self, step: int, max_steps: int, former: Sequence[Mapping[str, Any]], best: float | None) -> None:
        """A run begins, or goes on behind the rows of a former one."""
        self.state.global_step, self.state.max_steps = step, max_steps
        self.state.compute_steps(self.arguments, max_steps)
        self.state.log_history = [{**named(row), "step": row["step"]} for row in former]
        self.state.best_metric = best
        self.handler.on_train_begin(self.arguments, self.state, self.control)

    def step(self, step: int, epoch: float) -> None:
        """An iteration has ended at this optimiser step. Flags that callbacks set stay up until they are read."""
        self.state.global_step, self.state.epoch = step, epoch
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.handler.on_step_end(self.arguments, self.state, self.control)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the finite numbers of a row."""
        logs = named(row) | {"epoch": round(self.state.epoch or 0.0, 6)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.handler.on_log(self.arguments, self.state, self.control, logs)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self.handler.on_evaluate(self.arguments, self.state, self.control, named(metrics))

    def best(self, metric: float | None, folder: Path | None) -> None:
        """The last evaluation is the best so far, and its policy lies in this folder."""
        self.state.best_metric, self.state.best_global_step = metric, self.state.global_step
        self.state.best_model_checkpoint = str(folder) if folder else None

    def pictures(self, images: Sequence[Any]) -> None:
        """Show pictures of an evaluation, which transformers' callbacks have no event for, where a tracker can."""
        if not images or not self.state.is_world_process_zero:
            return
        for callback in self.handler.callbacks:
            board, wandb = getattr(callback, "tb_writer", None), getattr(callback, "_wandb", None)
            if board is not None:
                board.add_image("eval/images", mosaic(images), self.state.global_step, dataformats="HWC")
            if wandb is not None and wandb.run is not None:
                step = {"train/global_step": self.state.global_step}
                wandb.log({"eval/images": [wandb.Image(image) for image in images], **step})

    def saved(self) -> None:
        self.handler.on_save(self.arguments, self.state, self.control)

    def end(self) -> None:
        self.handler.on_train_end(self.arguments, self.state, self.control)

    @property
    def should_stop(self) -> bool:
        return self.control.should_training_stop


def named(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The finite numbers of a row, those of an evaluation with the prefix that transformers knows them by."""
    return {key.replace("eval/", "eval_", 1): value for key, value in row.items() if is_number(value)}


def mosaic(images: Sequence[Any], columns: int = 10) -> np.ndarray:
    """Pictures of one size side by side, as (height, width, 3) numbers from 0 to 255; the last row ends in black."""
    tiles = [np.asarray(image.convert("RGB")) for image in images]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % min(columns, len(tiles)))
    rows = [np.concatenate(tiles[k : k + columns], axis=1) for k in range(0, len(tiles), columns)]
    return np.concatenate(rows, axis=0)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
