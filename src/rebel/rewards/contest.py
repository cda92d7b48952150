"""Any reward as a judge: the higher one wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rebel.types import Comparison, Completion, Prompt, Reward, Rollout

REWARD = "reward:"


@dataclass(frozen=True, slots=True)
class HigherReward:
    """The completion with the higher reward is better; equal rewards are a tie, and one without a reward no answer."""

    reward: Reward
    name: str
    aside: Callable[[], AbstractContextManager] = nullcontext
    """Within it what the reward notes down is not kept: where half of what it sees is not the policy's."""

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        pairs = [Rollout(c.prompt, (Completion(c.first, None), Completion(c.second, None))) for c in comparisons]
        with self.aside():
            margins = [float(scored.pair_margins()[0, 1]) for scored in self.reward(pairs)]
        return [None if math.isnan(margin) else 0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins]

    def check(self, prompts: Sequence[Prompt]) -> None:
        check: Any = getattr(self.reward, "check", None)
        if check is not None:
            check(prompts)
