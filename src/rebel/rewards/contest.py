"""A judge for `--judge`: a function of two completions, or any reward, the higher of which wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rebel.errors import RebelError, RunStopped
from rebel.rewards.functions import Notes
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


@dataclass(frozen=True, slots=True)
class PairFunction:
    """`fn(prompts, first, second, **columns)` returns P(first is better) for each comparison, or None."""

    fn: Callable[..., Any]
    name: str

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        names = dict.fromkeys(name for c in comparisons for name in c.prompt.meta)
        columns = {name: [c.prompt.meta.get(name) for c in comparisons] for name in names}
        given = {
            "prompts": [c.prompt.content for c in comparisons],
            "first": [c.first for c in comparisons],
            "second": [c.second for c in comparisons],
        }
        try:
            return list(self.fn(**{**columns, **given}))
        except Exception as cause:
            raise RunStopped(f"the judge {self.name} raised {type(cause).__name__}: {cause}") from cause


def load_contest(spec: str, notes: Notes | None = None, **model_settings: Any) -> Judge:
    """The judge of that name. `model_settings` are those of a reward model."""
    if spec.startswith(REWARD):
        return HigherReward(load_reward(spec.removeprefix(REWARD), notes, **model_settings), spec)
    found: Any = load_reward(spec, notes, **model_settings)
    if not hasattr(found, "fn"):
        raise RebelError(f"--judge {spec} is a reward model; give {REWARD}{spec}")
    return PairFunction(found.fn, found.name)


def check_judge(judge: Judge | None, prompts: Sequence[Prompt]) -> None:
    """Raises RebelError where the judge cannot compare completions of these prompts."""
    look: Any = getattr(judge, "check", None)
    if look is not None:
        look(prompts)
