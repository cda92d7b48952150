"""A judge that decides contests: any that training takes, or any reward, the higher of which wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rebel.rewards.functions import Notes
from rebel.rewards.judge_load import Service, load_judge
from rebel.rewards.load import load_reward
from rebel.types import Comparison, Completion, Judge, Prompt, Reward, Rollout

REWARD = "reward:"


@dataclass(frozen=True, slots=True)
class HigherReward:
    """The completion with the higher reward is better; equal rewards are a tie, and one without a reward no answer."""

    reward: Reward
    name: str

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        pairs = [Rollout(c.prompt, (Completion(c.first, None), Completion(c.second, None))) for c in comparisons]
        margins = [float(scored.pair_margins()[0, 1]) for scored in self.reward(pairs)]
        return [None if math.isnan(margin) else 0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins]

    def check(self, prompts: Sequence[Prompt]) -> None:
        check: Any = getattr(self.reward, "check", None)
        if check is not None:
            check(prompts)


def load_contest(
    spec: str,
    notes: Notes | None = None,
    template: str | None = None,
    service: Service | None = None,
    **model_settings: Any,
) -> Judge:
    """The judge of that name: `reward:NAME`, or any that training takes. `model_settings` are those of a model."""
    if spec.startswith(REWARD):
        return HigherReward(load_reward(spec.removeprefix(REWARD), notes, **model_settings), spec)
    return load_judge(spec, notes, template, service, **model_settings)


def check_judge(judge: Judge | None, prompts: Sequence[Prompt]) -> None:
    """Raises RebelError where the judge cannot compare completions of these prompts."""
    look: Any = getattr(judge, "check", None)
    if look is not None:
        look(prompts)
