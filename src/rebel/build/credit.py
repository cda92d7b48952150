"""What rewards are credited to, decided by what is tuned and by what the rewards can judge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rebel import credit
from rebel.config import RebelConfig
from rebel.policies.rows import WHOLE, Stretches
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import PerCompletion
from rebel.types import Credit, Reward

CREDITS: dict[str, Credit] = {
    "auto": credit.trajectory,  # where no reward decides it
    "trajectory": credit.trajectory,
    "step": credit.step,
    "stretch": credit.step,
}


def decided(config: RebelConfig, reward: Weighted | None) -> RebelConfig:
    """The settings with --credit auto decided: stretches where all that judges a run says it can judge beginnings."""
    if config.credit != "auto":
        return config
    whole = config.offline or config.from_rollouts or config.rounds or config.judge or config.pipeline_name_or_path
    able = reward is not None and judge_beginnings(reward.rewards) and config.pairing != "extremes"
    return replace(config, credit="stretch" if able and not whole else "trajectory")


def judge_beginnings(rewards: Sequence[Reward]) -> bool:
    """Whether all these rewards are functions that say that they can judge unfinished text."""
    return all(isinstance(reward, PerCompletion) and says_so(reward.fn) for reward in rewards)


def says_so(fn: Callable[..., Any]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return bool(getattr(fn, "judges_beginnings", False))


def credit_of(config: RebelConfig) -> Credit:
    """The columns of the regression."""
    return CREDITS["step" if config.algorithm == "ppo_clip" else config.credit]


def stretches_of(config: RebelConfig) -> Stretches:
    """The segments that the log-probabilities of a completion are summed over."""
    if config.credit != "stretch":
        return WHOLE
    return Stretches(config.credit_tokens, max(1, -(-config.max_completion_length // config.credit_tokens)))


def credit_in_words(config: RebelConfig) -> tuple[str, ...]:
    """A line of the plan, where more than whole completions is scored."""
    if config.credit != "stretch":
        return ()
    return (
        f"credit       to each stretch of {config.credit_tokens} tokens, by the reward of what is written so far: a "
        f"completion is scored up to {stretches_of(config).count} times",
    )
