"""Callbacks and experiment trackers of transformers, called as its Trainer calls them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
        own = [DefaultFlowCallback, *get_reporting_integration_callbacks(arguments.report_to)]
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

    def saved(self) -> None:
        self.handler.on_save(self.arguments, self.state, self.control)

    def end(self) -> None:
        self.handler.on_train_end(self.arguments, self.state, self.control)

    @property
    def should_stop(self) -> bool:
        return self.control.should_training_stop


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
