"""The schedule of the learning rate."""

from __future__ import annotations

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def schedule(config: RebelConfig) -> Complaints:
    """A warm-up has a schedule that warms up, and the schedule goes by steps alone."""
    if config.warmup_steps and config.lr_scheduler_type == "constant":
        yield (
            f"{said(config, 'warmup_steps', 'lr_scheduler_type')} has no effect; use --lr_scheduler_type "
            "constant_with_warmup, linear or cosine"
        )
    if config.lr_scheduler_type == "reduce_lr_on_plateau":
        yield f"{said(config, 'lr_scheduler_type')} waits for a metric; use a schedule that goes by steps"
