"""The learner with its optimiser, schedule and average."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import (
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from rebel.build.credit import credit_of
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.learner import Learner, learner
from rebel.types import Policy


def memory_of_average(config: RebelConfig) -> float:
    """Averaging pays where iterates come to rest, and lags behind where they keep moving."""
    if config.average is None:
        return 0.3 if config.beta and not config.mixture else 0.0
    return config.average


def build_learner(
    accelerator: Accelerator, policy: Policy, config: RebelConfig, arguments: TrainingArguments, steps: int, budget: int
) -> Learner:
    """The learner with the optimiser and schedule of these names; `budget` is the cost of one micro-batch."""

    def optimizer(weights: list[Tensor]) -> torch.optim.Optimizer:
        try:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, ValueError) as error:  # its library is missing, or too old
            raise RebelError(f"--optim {config.optim}: {error}") from error
        return kind(weights, weight_decay=config.weight_decay, **settings)

    warmup = config.warmup_steps
    schedule = partial(
        get_scheduler,
        config.lr_scheduler_type,
        num_warmup_steps=int(warmup if warmup >= 1 else warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs or None,
    )

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        try:
            return schedule(optimizer=optimizer)
        except (TypeError, ValueError) as error:  # what it needs is missing, or not known to it
            raise RebelError(
                f"--lr_scheduler_type {config.lr_scheduler_type} with --lr_scheduler_kwargs "
                f"{config.lr_scheduler_kwargs}: {error}"
            ) from error

    return learner(
        accelerator,
        policy,
        optimizer,
        scheduler,
        budget=budget,
        max_grad_norm=config.max_grad_norm,
        average=memory_of_average(config),
        credit=credit_of(config),
    )
