"""Win rates: the reward of a completion is how often it is preferred to completions of the policy.

For the completions y_1..y_n of a prompt that pi_t drew, and P from a judge,

    r_i = (1/n) * sum over k of P(y_i > y_k | x),    P(y_i > y_i) = 1/2.

Over the drawing of the group the regression's target is then P(y > y' | x), y' ~ pi_t: its exact minimiser is
pi_t * exp(eta' * win rate), for every n. Leaving oneself out would make it n/(n-1) times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.errors import RebelError
from rebel.report.rows import append_rows, read_rows
from rebel.rewards.functions import Notes
from rebel.rewards.judges import ask, key_of
from rebel.types import Comparison, Completion, Judge, Prompt, Rollout, Scored

Unit = Literal["win_rate", "advantage"]
Opponents = Literal["group", "shared"]

OF_POLICY = "policy"
"""The `source` of completions that pi_t drew."""


@dataclass(frozen=True, slots=True)
class WinRate:
    """The win rate of each completion against those of its group that the policy drew.

    * `unit="advantage"` is 2 * win rate - 1: the same preferences in a unit half as large, which doubles eta.
    * `opponents="shared"` takes one opponent y'' for the whole group, its first completion by the policy, and not
      all of them. They are drawn alike, so the expectation is the same; the judge is asked for n - 1 comparisons
      instead of n(n - 1)/2, and the reward is noisier.
    * `swap` asks for both orders of a pair and takes the mean, see `ask`.

    Completions of other sources are judged, and are nobody's opponent. A comparison without an answer is left out of
    the mean of its two completions; one that has no answer at all has the reward NaN and leaves its group. Two
    completions of the same content are a tie, and the judge is not asked.
    """

    judge: Judge
    unit: Unit = "win_rate"
    opponents: Opponents = "group"
    swap: bool = True
    notes: Notes = field(default_factory=Notes)

    @property
    def name(self) -> str:
        return self.judge.name

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        probabilities = compared(self.judge, rollouts, list(map(self.pairs, rollouts)), self.swap, self.notes)
        return [
            self.scored(rollout, win_rates(p, self.rivals(rollout)))
            for rollout, p in zip(rollouts, probabilities, strict=True)
        ]

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_judge(self.judge, prompts)

    def rivals(self, rollout: Rollout) -> list[int]:
        """Places of the completions that the others are compared with."""
        places = [k for k, completion in enumerate(rollout.completions) if completion.source == OF_POLICY]
        if not places:
            raise RebelError(
                f"a win rate is against completions of the policy, and the prompt {str(rollout.prompt.content)[:60]!r} "
                "has none; give people's comparisons as margins instead"
            )
        return places if self.opponents == "group" else places[:1]

    def pairs(self, rollout: Rollout) -> list[tuple[int, int]]:
        """What the judge is asked: every completion against every opponent, each pair once."""
        rivals = self.rivals(rollout)
        everyone = range(len(rollout.completions))
        return sorted({(min(i, k), max(i, k)) for i in everyone for k in rivals if i != k})

    def scored(self, rollout: Rollout, rates: Float[Tensor, " G"]) -> Scored:
        """The rollout with its win rates as rewards, in the unit that was asked for."""
        rewards = (2 * rates - 1 if self.unit == "advantage" else rates).float()
        return Scored(rollout, rewards=rewards, components={self.name: rewards})


def win_rates(probabilities: Float[Tensor, "G G"], rivals: Sequence[int]) -> Float[Tensor, " G"]:
    """The mean of P(y_i > y_k) over the rivals k, oneself at 1/2, over the answers that there are; NaN without any."""
    against = probabilities[:, list(rivals)]
    known = ~against.isnan()
    others = known.clone()
    others[list(rivals), range(len(rivals))] = False
    only_itself = torch.tensor([list(rivals) == [place] for place in range(len(probabilities))])
    rates = against.nan_to_num(nan=0.0).sum(dim=1) / known.sum(dim=1)
    return rates.masked_fill(~(others.any(dim=1) | only_itself), torch.nan)


def compared(
    judge: Judge,
    rollouts: Sequence[Rollout],
    pairs: Sequence[Sequence[tuple[int, int]]],
    swap: bool,
    notes: Notes,
) -> list[Float[Tensor, "G G"]]:
    """P(y_i > y_k) of these pairs of each rollout, both ways; 1/2 on the diagonal, NaN where nobody answered."""
    asked, places = [], []
    found = [torch.full((len(r.completions), len(r.completions)), torch.nan, dtype=torch.float64) for r in rollouts]
    for matrix, rollout, own in zip(found, rollouts, pairs, strict=True):
        contents = [completion.content for completion in rollout.completions]
        for i, k in [*own, *((i, i) for i in range(len(contents)))]:
            if contents[i] == contents[k]:
                matrix[i, k] = matrix[k, i] = 0.5
                continue
            asked.append(Comparison(rollout.prompt, contents[i], contents[k]))
            places.append((matrix, i, k))
    verdicts = ask(judge, asked, swap)
    for (matrix, i, k), p in zip(places, verdicts.probabilities, strict=True):
        if p is not None:
            matrix[i, k], matrix[k, i] = p, 1 - p
    for name, value in verdicts.metrics.items():
        notes.log_metric(f"judge/{name}", value)
    return found


def check_judge(judge: Judge, prompts: Sequence[Prompt]) -> None:
    check: Any = getattr(judge, "check", None)
    if check is not None:
        check(prompts)


@dataclass(frozen=True, slots=True)
class AgainstFirst:
    """The win rate against the completions that the same prompt had when it was first seen.

    For evaluations, in which a win rate against one's own group is 1/2 by symmetry: the first one is of the initial
    policy, so that all later ones say how often the policy is preferred to that. The opponents are kept in `file`, for
    runs that are resumed.
    """

    of: WinRate
    file: Path
    known: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.of.name

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        self.remember(rollouts)
        together = [self.with_opponents(rollout) for rollout in rollouts]
        places = [
            (range(len(r.completions)), range(len(r.completions), len(t.completions)))
            for r, t in zip(rollouts, together, strict=True)
        ]
        pairs = [[(i, k) for i in judged for k in opponents] for judged, opponents in places]
        found = compared(self.of.judge, together, pairs, self.of.swap, self.of.notes)
        rates = [win_rates(p, opponents)[: len(judged)] for p, (judged, opponents) in zip(found, places, strict=True)]
        return [self.of.scored(rollout, own) for rollout, own in zip(rollouts, rates, strict=True)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.of.check(prompts)

    def with_opponents(self, rollout: Rollout) -> Rollout:
        """The completions to judge, and then the opponents."""
        opponents = [Completion(content, None) for content in self.known[key_of(rollout.prompt.content)]]
        return Rollout(rollout.prompt, (*rollout.completions, *opponents))

    def remember(self, rollouts: Sequence[Rollout]) -> None:
        """Note the completions of prompts that are seen for the first time."""
        if not self.known:
            self.known.update((row["prompt"], row["completions"]) for row in read_rows(self.file))
        new = {key_of(r.prompt.content): r for r in rollouts if key_of(r.prompt.content) not in self.known}
        rows = [{"prompt": key, "completions": [c.content for c in r.completions]} for key, r in new.items()]
        self.known.update((row["prompt"], row["completions"]) for row in rows)
        if rows:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            append_rows(self.file, rows)
