"""eta', the step of an iteration in nats per unit of reward: given, or chosen so that the policy moves a stated KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rebel.algorithm import step_size

SLACK = 1.5
"""The steps of an iteration end early once its KL passes this multiple of the goal."""

LONGEST = 1e6
"""eta' where nothing else bounds it: far beyond what any regression can fit."""


@runtime_checkable
class StepRule(Protocol):
    """How long the next step is."""

    def step(self, variance: float, correction: float) -> float:
        """eta' for shaped rewards whose mean variance within a group is `variance`."""
        ...

    def goal(self, variance: float) -> float | None:
        """KL in nats per completion by which this iteration is to move the policy; None for as far as it goes."""
        ...

    def corrected(self, correction: float, scale: float) -> float:
        """The next correction, after an iteration whose movement had to be scaled by `scale` to meet the goal."""
        ...

    @property
    def stretch(self) -> float:
        """How many times as far an iteration may be made to go to meet its goal."""
        ...


@dataclass(frozen=True, slots=True)
class GivenEta:
    """The eta of the settings, combined with beta. The policy moves as far as the optimiser takes it."""

    eta: float
    beta: float
    kl: str = "proximal"

    def step(self, variance: float, correction: float) -> float:
        return step_size(self.eta, self.beta, self.kl)

    def goal(self, variance: float) -> float | None:
        return None

    def corrected(self, correction: float, scale: float) -> float:
        return correction

    @property
    def stretch(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class AutoEta:
    """eta' = correction * sqrt(2 * kl / variance): to second order KL(pi_{t+1} || pi_t) = eta'^2 * variance / 2.

    An optimiser does not solve the regression, so the policy moves by another KL than the exact minimiser would. Two
    things make up for it. The movement of the weights is scaled to the goal at the end of the iteration: in a linear
    model of the log-probabilities that is what another eta' would have given. And the correction follows, so that
    the next iteration needs less of it. eta' is never longer than 1 / beta, where the iteration is at its fixed point.

    With beta > 0 the iterates converge, and the goal is the most that one moves: to keep up a constant KL near the
    fixed point would mean to walk on noise.
    """

    kl: float
    beta: float

    def step(self, variance: float, correction: float) -> float:
        return min(correction * self.exact(variance), self.longest)

    def goal(self, variance: float) -> float | None:
        return min(self.kl, self.exact(variance) ** 2 * variance / 2)

    def exact(self, variance: float) -> float:
        """eta' whose exact minimiser is at the goal, or at the fixed point if that is nearer."""
        return min(math.sqrt(2 * self.kl / variance), self.longest) if variance > 0 else self.longest

    @property
    def longest(self) -> float:
        return 1 / self.beta if self.beta else LONGEST

    def corrected(self, correction: float, scale: float) -> float:
        """Never below 1: an exact regression moves by the goal, and one that is not exact by less."""
        return min(max(1.0, correction * min(4.0, max(0.25, scale))), 1e4)

    @property
    def stretch(self) -> float:
        return 1.0 if self.beta else 4.0
