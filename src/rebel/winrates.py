"""Win rates from judged pairs: both orders averaged, ties counted, an interval over prompts, and what length explains.

Pure arithmetic. P is always "the first of the pair is better", from 0 to 1, with 0.5 for a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest, bootstrap

from rebel.errors import RebelError

LONGER = 1.25
"""Lengths differ much from this ratio on."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of a pair in the order (ours, theirs) and in the order (theirs, ours)."""

    prompt: int
    forward: float | None
    backward: float | None

    @property
    def score(self) -> float | None:
        """P(ours is better) with the judge's liking for one place averaged out; None where an order has no answer."""
        if self.forward is None or self.backward is None:
            return None
        return (self.forward + 1 - self.backward) / 2

    @property
    def consistent(self) -> bool:
        """Whether the same side (or neither) is better in both orders."""
        assert self.forward is not None and self.backward is not None
        return outcome(self.forward) == -outcome(self.backward)


@dataclass(frozen=True, slots=True)
class WinRate:
    """Ours against theirs, over prompts. Shares are of the pairs that have a score."""

    win_rate: float
    low: float
    high: float
    wins: float
    ties: float
    losses: float
    swap_consistency: float
    first_place: float
    prompts: int
    pairs: int
    unanswered: int

    def metrics(self) -> dict[str, float]:
        return asdict(self)


def outcome(p: float) -> int:
    """1 for a win of the first, 0 for a tie, -1 for a loss."""
    return int(p > 0.5) - int(p < 0.5)


def checked(values: Sequence[float | None], count: int, name: str) -> list[float | None]:
    """What a judge returned, or an error in its name: as many values as comparisons, each None or from 0 to 1."""
    if len(values) != count:
        raise RebelError(
            f"the judge {name} returned {len(values)} values for {count} comparisons; one each is expected"
        )
    for value in values:
        if value is not None and not 0 <= value <= 1:
            raise RebelError(
                f"the judge {name} returned {value:g}; P(first is better) is a number from 0 to 1, or None"
            )
    return list(values)


def win_rate(verdicts: Sequence[Verdict], seed: int = 0, confidence: float = 0.95) -> WinRate:
    """The win rate of ours: the mean over prompts of the mean score of a prompt's pairs, a tie being half a win."""
    answered = [verdict for verdict in verdicts if verdict.score is not None]
    if not answered:
        raise RebelError(f"the judge answered none of the {len(verdicts)} pairs in both orders: there is no win rate")
    means = np.array(prompt_means(answered))
    low, high = interval(means, seed, confidence)
    results = [outcome(score_of(verdict)) for verdict in answered]
    asked_first = [p for verdict in answered for p in (verdict.forward, verdict.backward)]
    return WinRate(
        win_rate=float(means.mean()),
        low=low,
        high=high,
        wins=results.count(1) / len(results),
        ties=results.count(0) / len(results),
        losses=results.count(-1) / len(results),
        swap_consistency=sum(verdict.consistent for verdict in answered) / len(answered),
        first_place=float(np.mean(np.array(asked_first, dtype=float))),
        prompts=len(means),
        pairs=len(answered),
        unanswered=len(verdicts) - len(answered),
    )


def prompt_means(answered: Sequence[Verdict]) -> list[float]:
    """The mean score of each prompt, so that prompts and not pairs are the sample."""
    scores: dict[int, list[float]] = {}
    for verdict in answered:
        scores.setdefault(verdict.prompt, []).append(score_of(verdict))
    return [math.fsum(values) / len(values) for values in scores.values()]


def score_of(verdict: Verdict) -> float:
    assert verdict.score is not None, "only pairs with a score come here"
    return verdict.score


def interval(means: np.ndarray, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval (BCa) of the mean over prompts.

    Resampling sees no spread where all prompts came out alike: then all wins or all losses have the exact binomial
    interval, and any other value stands for itself.
    """
    if len(means) < 2:
        return 0.0, 1.0
    if np.ptp(means) > 0:
        drawn = bootstrap((means,), np.mean, confidence_level=confidence, rng=np.random.default_rng(seed))
        low, high = drawn.confidence_interval
        return float(low), float(high)
    value = float(means[0])
    if value in (0.0, 1.0):
        exact = binomtest(int(value * len(means)), len(means)).proportion_ci(confidence)
        return float(exact.low), float(exact.high)
    return value, value


# -- length --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean lengths of both sides, how often the longer one was preferred, and the win rate at equal length."""

    ours: float
    theirs: float
    longer_preferred: float
    controlled: float

    @property
    def differ(self) -> bool:
        short, long = sorted((self.ours, self.theirs))
        return long > LONGER * max(short, 1e-9)


def lengths(scores: Sequence[float], ours: Sequence[int], theirs: Sequence[int]) -> Lengths:
    """What length has to do with the scores of these pairs."""
    difference = np.array(ours, dtype=float) - np.array(theirs, dtype=float)
    p = np.array(scores, dtype=float)
    of_longer = np.where(difference > 0, p, 1 - p)[difference != 0]
    return Lengths(
        ours=float(np.mean(ours)),
        theirs=float(np.mean(theirs)),
        longer_preferred=float(of_longer.mean()) if len(of_longer) else math.nan,
        controlled=controlled(p, difference),
    )


def controlled(scores: np.ndarray, difference: np.ndarray, ridge: float = 1.0) -> float:
    """The win rate that remains at equal length: logit P = a + b * tanh(difference / its spread), at difference 0.

    This is the length term of AlpacaEval 2's length control. The ridge on a and b (a standard normal prior) keeps
    both finite where a side wins always; NaN where lengths do not vary, so that nothing can be told apart.
    """
    if len(scores) < 2 or np.ptp(difference) == 0:
        return math.nan
    x = np.tanh(difference / difference.std())

    def loss(w: np.ndarray) -> float:
        logit = w[0] + w[1] * x
        return float((np.logaddexp(0, logit) - scores * logit).sum() + ridge * (w**2).sum() / 2)

    return float(expit(minimize(loss, np.zeros(2)).x[0]))
