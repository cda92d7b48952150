"""The way of the weights in one iteration, held to a goal of KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from rebel.learner import Departure, Learner
from rebel.types import OWN, Scored

PROBE = 2048
"""Completions on which the KL of an iteration is measured: those of as many prompts as there are first."""

TRIALS = 5
"""Measurements of the KL until the scale of the way is settled; two or three are usual."""

CLOSE = 0.03
"""A KL this near to the goal, relative to it, is left as it is."""

STEEPEST, FLATTEST = 6.0, 0.5
"""Bounds of d log KL / d log scale, which is 2 near the start of the way."""


@dataclass(frozen=True, slots=True)
class Moved:
    """How far an iteration went: the factor its weights' movement was scaled by, and the KL where it was measured."""

    scale: float = 1.0
    kl: float | None = None


def meet(learner: Learner, start: Departure, goal: float, leeway: float, groups: Sequence[Scored]) -> Moved:
    """Scale the movement of the weights since `start`, by at most `leeway`, so that the policy moved by `goal` nats.

    The KL is that of whole next-token distributions at the places of completions drawn from pi_t. It is within a few
    per cent of that on fresh completions, where log-ratios of the completions trained on are twice too large.
    """
    traces = probe(groups)
    scale, slope = 1.0, 2.0
    kl = divergence(learner, start, traces)
    for _ in range(TRIALS - 1):
        wanted = min(leeway, scale * (goal / kl) ** (1 / slope)) if kl > 0 else scale
        if abs(wanted / scale - 1) < CLOSE / 2:
            break
        learner.scale_way(start, wanted / scale)
        now = divergence(learner, start, traces)
        if now > 0:
            slope = min(STEEPEST, max(FLATTEST, math.log(now / kl) / math.log(wanted / scale)))
        scale, kl = wanted, now
    return Moved(scale, kl)


def divergence(learner: Learner, start: Departure, traces: Sequence[Any]) -> float:
    """Mean KL(pi_theta || pi_t) of the traces in nats."""
    return float(learner.score(lambda some: learner.policy.divergence(some, start.weights), traces).mean())


def probe(groups: Sequence[Scored]) -> list[Any]:
    """Up to PROBE traces that the policy drew, the first of every group before the second of any."""
    drawn = [[c.trace for c in group.rollout.completions if c.source == OWN] for group in groups]
    rows = zip_longest(*drawn)
    return [trace for trace in chain.from_iterable(rows) if trace is not None][:PROBE]
