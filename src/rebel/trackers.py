"""Callbacks and experiment trackers of transformers, called as its Trainer calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

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
    """The settings as transformers has them, for its optimisers, callbacks and trackers."""
    try:
        return TrainingArguments(**{name: getattr(config, name) for name in SHARED}, save_strategy="no")
    except (ValueError, ImportError) as error:  # precision this machine lacks, an unknown optimiser, a missing tracker
        raise RebelError(f"transformers refuses these settings: {str(error).splitlines()[0]}") from error


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
    """Tells `callbacks` and the trackers of --report_to how a run goes. They see the state and may end the run."""

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
        own = [DefaultFlowCallback, *reporting(arguments)]
        self.arguments = arguments
        self.handler = CallbackHandler([*own, *callbacks], model, tokenizer, optimizer, scheduler)
        self.state = TrainerState(is_world_process_zero=main, is_local_process_zero=main)
        self.control = TrainerControl()

    def begin(self, step: int, max_steps: int) -> None:
        self.state.global_step, self.state.max_steps = step, max_steps
        self.handler.on_train_begin(self.arguments, self.state, self.control)

    def step(self, step: int, epoch: float) -> None:
        """An iteration has ended at this optimiser step. Flags that callbacks set stay up until they are read."""
        self.state.global_step, self.state.epoch = step, epoch
        self.handler.on_step_end(self.arguments, self.state, self.control)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the finite numbers of a row, evaluation keys with the prefix that transformers knows them by."""
        logs = {key.replace("eval/", "eval_", 1): value for key, value in row.items() if is_number(value)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.handler.on_log(self.arguments, self.state, self.control, logs)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        named = {key.replace("eval/", "eval_", 1): value for key, value in metrics.items()}
        self.handler.on_evaluate(self.arguments, self.state, self.control, named)

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


def mosaic(images: Sequence[Any], columns: int = 10) -> np.ndarray:
    """Pictures of one size side by side, as (height, width, 3) numbers from 0 to 255; the last row ends in black."""
    tiles = [np.asarray(image.convert("RGB")) for image in images]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % min(columns, len(tiles)))
    rows = [np.concatenate(tiles[k : k + columns], axis=1) for k in range(0, len(tiles), columns)]
    return np.concatenate(rows, axis=0)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
