"""What of a trajectory is credited with its reward: all of it together, or each of its steps or stretches.

A credit makes the columns of a regression from the log-probabilities of the segments of traces, (N, S). Every segment
counts once, in one column, so that the c of a column is that of each of its segments.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


def trajectory(logp: Float[Tensor, "N S"]) -> Float[Tensor, " N"]:
    """The paper's: one regression, of the log-probability of the whole trajectory."""
    return logp.sum(dim=1)


def step(logp: Float[Tensor, "N S"]) -> Float[Tensor, "N S"]:
    """Every step of a trajectory has a regression of its own, onto the same margins if it has none of its own (as the
    stretches of a text have, see `rebel.gains`); eta still is that of the whole."""
    return logp


@dataclass(frozen=True, slots=True)
class Known:
    """Weights c of columns that are known before the log-probabilities are.

    A policy may call it as any other; one for which log-probabilities cost a pass of their own reads it instead.
    """

    columns: Float[Tensor, "N *C"]

    def __call__(self, logp: Float[Tensor, "N S"]) -> Float[Tensor, "N S"]:
        return spread(self.columns.to(logp), logp.shape[1])


def spread(weights: Float[Tensor, "N *C"], segments: int) -> Float[Tensor, "N S"]:
    """c of every segment from c of its column."""
    return weights if weights.ndim > 1 else weights[:, None].expand(-1, segments)
