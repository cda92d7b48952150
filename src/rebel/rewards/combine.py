"""Several rewards as one: their weighted sum, each kept under its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.errors import RebelError
from rebel.rewards.functions import PerCompletion, Values, as_rewards
from rebel.rewards.groups import Scale, in_groups, scaled
from rebel.types import Prompt, Reward, Rollout, Scored


@dataclass(frozen=True, slots=True)
class Weighted:
    """The weighted sum of rewards, divided by its standard deviation as `scale` says.

    A function that does not apply to a completion is left out of that completion's sum. The reward is NaN where no
    function has a value, and where one has a value that nobody can use. Components are the raw values (NaN: none).
    """

    rewards: Sequence[Reward]
    weights: Sequence[float] | None = None
    scale: Scale = "none"
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise RebelError("--reward_funcs names no reward; give at least one")
        _check_weights(self.weights, len(self.rewards))
        names = [getattr(reward, "name", type(reward).__name__) for reward in self.rewards]
        object.__setattr__(self, "names", distinct(names))

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        begun = [_begin(reward, name, rollouts) for reward, name in zip(self.rewards, self.names, strict=True)]
        values = [wait() for wait in begun]
        components = {name: as_rewards(row) for name, row in zip(self.names, values, strict=True)}
        weights = self.weights or [1.0] * len(self.rewards)
        return scaled(in_groups(rollouts, weighted_sum(values, weights), components), self.scale)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises RebelError where one of the rewards cannot score completions of these prompts."""
        for reward in self.rewards:
            check = getattr(reward, "check", None)
            if check is not None:
                check(prompts)


def weighted_sum(values: Sequence[Values], weights: Sequence[float]) -> Float[Tensor, " N"]:
    """For each completion the sum of weight * value over the functions that have one; NaN where none has."""
    totals = [_sum_of_known(column, weights) for column in zip(*values, strict=True)]
    return as_rewards(totals)


def _sum_of_known(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    known = [(weight, value) for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(weight * value for weight, value in known) if known else None


def distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each later one of the same name with a number behind it."""
    taken: dict[str, None] = {}
    for name in names:
        number, new = 1, name
        while new in taken:
            number += 1
            new = f"{name}_{number}"
        taken[new] = None
    return tuple(taken)


def _begin(reward: Reward, name: str, rollouts: Sequence[Rollout]) -> Callable[[], Values]:
    """Async functions start here, so that they run while the other rewards are computed."""
    if isinstance(reward, PerCompletion):
        return reward.begin(rollouts)
    return partial(_group_values, reward, name, rollouts)


def _group_values(reward: Reward, name: str, rollouts: Sequence[Rollout]) -> Values:
    scored = reward(rollouts)
    rewards = [group.rewards for group in scored if group.rewards is not None]
    if len(rewards) < len(scored):
        raise RebelError(f"{name} compares pairs and gives no reward to add to others; use it as the only reward")
    return torch.cat(rewards).tolist() if rewards else []


def _check_weights(weights: Sequence[float] | None, count: int) -> None:
    if weights is None:
        return
    if len(weights) != count:
        raise RebelError(f"--reward_weights gives {len(weights)} weights for {count} --reward_funcs; give one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise RebelError(f"--reward_weights {' '.join(map(str, weights))}: every weight has to be a finite number")
