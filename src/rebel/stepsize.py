"""eta', the step of an iteration in nats per unit of reward: given, or chosen so that the policy moves a stated KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rebel.algorithm import step_size

REACH = 5.0
"""Nats that eta: auto asks of a reward difference of one standard deviation. Aimed at much less, several passes
memorise their completions and explain no others; aimed much farther, the residuals hardly change and it is policy
gradient (benchmarks/NOTES.md)."""

FARTHEST = 1e6
"""eta where nothing else bounds it: far beyond what any regression can fit."""


@runtime_checkable
class StepRule(Protocol):
    """How long the next step is."""

    def step(self, variance: float) -> float:
        """eta' for shaped rewards whose mean variance within a group is `variance`."""
        ...

    def goal(self, variance: float) -> float | None:
        """KL in nats per completion by which this iteration is to move the policy; None for as far as it goes."""
        ...

    @property
    def leeway(self) -> float:
        """How many times as far an iteration may be made to go to meet its goal."""
        ...


@dataclass(frozen=True, slots=True)
class GivenEta:
    """The eta of the settings, combined with beta. The policy moves as far as the optimiser takes it."""

    eta: float
    beta: float
    kl: str = "proximal"

    def step(self, variance: float) -> float:
        return step_size(self.eta, self.beta, self.kl)

    def goal(self, variance: float) -> float | None:
        return None

    @property
    def leeway(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class AutoEta:
    """eta in units of the reward's own spread: REACH / its standard deviation within groups; eta' = 1/(1/eta + beta).

    With a stated `kl` it also keeps KL(pi_{t+1} || pi_t), eta'^2 * variance / 2 for the exact minimiser to second
    order, at that many nats. An optimiser does not solve the regression, so the goal is met by scaling the way of
    the weights at the end of the iteration: where the log-probabilities are linear in the weights, that is what
    another eta' would have given. With beta > 0 the iterates converge, and the goal is the most that one moves: to
    keep up a constant KL near the fixed point would mean to walk on noise.
    """

    beta: float
    kl: float | None = None

    def step(self, variance: float) -> float:
        eta = REACH / math.sqrt(variance) if variance > 0 else FARTHEST
        return min(FARTHEST, step_size(eta, self.beta))

    def goal(self, variance: float) -> float | None:
        return self.kl if variance > 0 else None

    @property
    def leeway(self) -> float:
        return 1.0 if self.beta else 4.0
