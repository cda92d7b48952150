"""eta', the step of an iteration in nats per unit of reward: given, or chosen so that the policy moves a stated KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from rebel.algorithm import step_size

SLACK = 1.5
"""The steps of an iteration end early once its KL passes this multiple of the goal."""


class StepRule(Protocol):
    """How long the next step is."""

    def step(self, variance: float, correction: float) -> float:
        """eta' for shaped rewards whose mean variance within a group is `variance`."""
        ...

    def corrected(self, correction: float, kl: float) -> float:
        """The correction after an iteration that moved the policy by `kl` nats."""
        ...

    @property
    def limit(self) -> float:
        """KL in nats at which the remaining steps of an iteration are left out."""
        ...


@dataclass(frozen=True, slots=True)
class GivenEta:
    """The eta of the settings, combined with beta."""

    eta: float
    beta: float
    kl: str

    def step(self, variance: float, correction: float) -> float:
        return step_size(self.eta, self.beta, self.kl)

    def corrected(self, correction: float, kl: float) -> float:
        return correction

    @property
    def limit(self) -> float:
        return math.inf


@dataclass(frozen=True, slots=True)
class AutoEta:
    """eta' = correction * sqrt(2 * goal / variance): to second order KL(pi_{t+1} || pi_t) = eta'^2 * variance / 2.

    Never longer than 1 / beta, where the iteration would already be at its fixed point.
    """

    goal: float
    beta: float

    def step(self, variance: float, correction: float) -> float:
        free = correction * math.sqrt(2.0 * self.goal / variance) if variance > 0 else math.inf
        longest = 1.0 / self.beta if self.beta else 1e6
        return min(free, longest)

    def corrected(self, correction: float, kl: float) -> float:
        """Moved towards the measured KL by at most a factor of two, half of the way on a logarithmic scale."""
        if not math.isfinite(kl) or kl <= 0:
            return correction
        return correction * min(2.0, max(0.5, math.sqrt(self.goal / kl)))

    @property
    def limit(self) -> float:
        return SLACK * self.goal
