"""How long to train: exactly one way of saying so, rounds of large batches included."""

from __future__ import annotations

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def length(config: RebelConfig) -> Complaints:
    """The length is said once."""
    if config.rounds is not None or config.from_rollouts:
        yield from _large_batch(config)
    elif config.max_steps != -1 and config.max_steps < 1:
        yield f"{said(config, 'max_steps')}: use 1 or more optimiser steps (-1: not given)"
    else:
        yield from _duration(config)


def _duration(config: RebelConfig) -> Complaints:
    given = [
        name for name in ("iterations", "max_steps", "num_train_epochs") if getattr(config, name) not in (None, -1)
    ]
    if not given:
        yield (
            "how long to train is not given: use --iterations, or --max_steps for optimiser steps, or "
            "--num_train_epochs for laps over the data, or --rounds for large batches"
        )
    elif len(given) > 1:
        yield f"{said(config, *given)}: {'both' if len(given) == 2 else 'all'} say how long to train; use one of them"


def _large_batch(config: RebelConfig) -> Complaints:
    way = "from_rollouts" if config.rounds is None else "rounds"
    if (config.rounds or 1) > 1 and config.from_rollouts:
        yield f"{said(config, 'rounds', 'from_rollouts')}: rollouts drawn before are one round; use --rounds 1"
    for name, neutral in (("iterations", None), ("max_steps", -1), ("num_train_epochs", None)):
        if getattr(config, name) != neutral:
            yield f"{said(config, name, way)}: rollouts and --round_epochs say how long to train; leave --{name} out"
    if config.replace_flat_groups:
        yield (
            f"{said(config, 'replace_flat_groups', way)}: all prompts are drawn from before any is regressed, so "
            "there are no others to draw in their place; leave it out"
        )
    if config.kl_per_iteration is not None:
        yield (
            f"{said(config, 'kl_per_iteration', way)}: it holds the KL of iterations that begin at their own pi_t, "
            "and these are parts of one round; leave it out, or use --iterations"
        )


def no_large_batch(config: RebelConfig) -> Complaints:
    """Settings of rounds come with rounds."""
    if config.rounds is None and not config.from_rollouts:
        for name, neutral in (("round_prompts", None), ("round_epochs", 1)):
            if getattr(config, name) != neutral:
                yield f"{said(config, name)} is for large batches; give --rounds with it"
