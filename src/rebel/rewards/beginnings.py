"""Rewards of the beginnings of completions: a reward that can judge unfinished text tells of each what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.types import Completion, Prompt, Reward, Rollout, Scored, TokenTrace

Write = Callable[[Prompt, Sequence[int], Sequence[int]], Completion[TokenTrace]]
"""The completion of a prompt with these ids, from the ids of both."""


@dataclass(frozen=True, slots=True)
class WithBeginnings:
    """A reward that also scores what stands after every `tokens` tokens of the policy, up to `count` stretches."""

    reward: Reward
    write: Write
    tokens: int
    count: int
    aside: Callable[[], AbstractContextManager] = nullcontext
    """Within it what a reward notes down is not kept: it is not about completions."""

    def __call__(self, rollouts: Sequence[Rollout[TokenTrace]]) -> list[Scored[TokenTrace]]:
        begun = [self.begun(rollout) for rollout in rollouts]
        with self.aside():
            known = self.reward([early for early in begun if early.completions])
        found = iter(known)
        early = [next(found) if rollout.completions else None for rollout in begun]
        return [
            replace(scored, beginnings=self.in_columns(scored.rollout, first))
            for scored, first in zip(self.reward(rollouts), early, strict=True)
        ]

    def begun(self, rollout: Rollout[TokenTrace]) -> Rollout[TokenTrace]:
        """All the beginnings of a prompt's completions, one after the other."""
        cut = [(trace, trace.completion[:end]) for trace in rollout.traces for end in self.ends(trace)]
        return Rollout(rollout.prompt, tuple(self.write(rollout.prompt, trace.prompt, ids) for trace, ids in cut))

    def ends(self, trace: TokenTrace) -> list[int]:
        """Where the beginnings of a trace end: each with what the policy reads before it writes the next stretch."""
        written = [place for place, own in enumerate(trace.written) if own]
        return written[:: self.tokens][1 : self.count]

    def in_columns(self, rollout: Rollout[TokenTrace], early: Scored | None) -> Float[Tensor, "G K"]:
        """The rewards of the beginnings; NaN where the completion has ended by then.

        One without a value counts as the others of its group at this place, and tells nothing.
        """
        table = torch.full((len(rollout.completions), self.count - 1), math.nan)
        rewards = iter(early.rewards.tolist() if early is not None and early.rewards is not None else ())
        for row, trace in zip(table, rollout.traces, strict=True):
            for k, _ in enumerate(self.ends(trace)):
                value = next(rewards)
                row[k] = value if math.isfinite(value) else math.inf
        unknown = table.isinf()
        others = table.masked_fill(unknown, math.nan).nanmean(dim=0).nan_to_num(nan=0.0)
        return torch.where(unknown, others, table)
