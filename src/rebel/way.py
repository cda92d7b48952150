"""The way of the weights in one iteration, held to a goal of KL."""

from __future__ import annotations

import math

from rebel import measures
from rebel.algorithm import Fit
from rebel.learner import Learner

SLACK = 1.5
"""The steps of an iteration end early once its KL passes this multiple of the goal."""

SHORTEST = 0.25
"""How far the movement of the weights may be shortened at the end of an iteration."""


class Way:
    """Follows the weights of `learner` from here, and scales their way so that the policy moves by `goal` nats.

    To second order the KL grows with the square of the distance of the weights. The factor between the two is
    measured on every minibatch before its own first step, when its completions are still unseen; pooled over the
    minibatches it is far less noisy than the KL on the last of them. (Where there is but one minibatch, its later
    passes have to do.) Without a goal it does nothing.
    """

    def __init__(self, learner: Learner, goal: float | None, stretch: float = 1.0) -> None:
        self.learner, self.goal, self.stretch = learner, goal or 0.0, stretch
        self.start = learner.depart() if goal else None
        self.last = 0.0
        self.unseen: list[tuple[float, float]] = []
        self.worn: list[tuple[float, float]] = []

    def too_far(self, fit: Fit) -> bool:
        """Whether the remaining steps should be left out; takes the measure of a minibatch."""
        if self.start is None:
            return False
        if self.last:
            point = (measures.half_variance(fit.logp - fit.batch.anchor_logp), self.last)
            (self.unseen if fit.fresh else self.worn).append(point)
        self.last = self.learner.distance(self.start)
        return self.kl > SLACK * self.goal

    @property
    def kl(self) -> float:
        """KL of the weights as they are now to where they set out, by the factor measured so far.

        A ratio of sums: the first steps, which go in directions of little KL, count for little.
        """
        points = self.unseen or self.worn
        return self.last * sum(kl for kl, _ in points) / sum(way for _, way in points) if points else math.nan

    def end(self) -> float:
        """Scale the way to the goal as far as may be; returns the scale that would have met it."""
        if self.start is None or not self.kl > 0:
            return 1.0
        scale = math.sqrt(self.goal / self.kl)
        self.learner.scale_way(self.start, min(self.stretch, max(SHORTEST, scale)))
        return scale
