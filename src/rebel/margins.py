"""Margins of a prompt's completions from comparisons of pairs of them: people's votes, probabilities, or numbers.

A margin matrix is antisymmetric, margins[i, j] = "i over j", with NaN where nobody compared and 0 on the diagonal: what
`Scored(rollout, margins=...)` takes. Nothing makes it transitive: if i beats j, j beats k and k beats i, it says so.

    margins_of_votes(4, [Vote(0, 1, 1.0), Vote(0, 1, 0.0), Vote(2, 1, 1.0), Vote(2, 3, 0.5)])

Votes and probabilities become the logit of P(i > j), in nats: the difference of rewards that explains them in the
model of Bradley and Terry. A logit is clipped at `CLIP`, which a certain answer (P = 0 or 1) has as its margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.errors import RebelError

CLIP = 3.0
"""Largest margin from a probability, in nats: that of P = 0.953. One unanimous vote is as far as any number of them."""

CLOSE = 1e-4
"""How far two statements of one pair may differ and still be the same one."""


@dataclass(frozen=True, slots=True)
class Vote:
    """Somebody's answer on two completions of a prompt, by their places: 1 for `first`, 0 for `second`, 0.5 for a tie.

    A share between them stands for several people, or for one who is unsure.
    """

    first: int
    second: int
    share: float | None


@dataclass(frozen=True, slots=True)
class Margin:
    """A number for "first over second": positive where the first of two completions is the better one."""

    first: int
    second: int
    value: float


def margins_of_votes(count: int, votes: Sequence[Vote], clip: float = CLIP) -> Float[Tensor, "G G"]:
    """Margins of `count` completions: for each pair the clipped logit of the mean share of its votes.

    People may disagree, and the votes may go round in circles. A vote without a winner (None or NaN) is an error:
    leave it out, or count it as the tie 0.5.
    """
    shares: dict[tuple[int, int], list[float]] = {}
    for vote in votes:
        _check_places(vote.first, vote.second, count)
        share = _share(vote)
        low, high = sorted((vote.first, vote.second))
        shares.setdefault((low, high), []).append(share if low == vote.first else 1.0 - share)
    probabilities = _empty(count)
    for (low, high), given in shares.items():
        probabilities[low, high] = sum(given) / len(given)
    return margins_of_probabilities(probabilities, clip)


def margins_of_probabilities(probabilities: Float[Tensor, "G G"], clip: float = CLIP) -> Float[Tensor, "G G"]:
    """Margins from P(i > j), NaN where it is not known: one of P(i > j) and P(j > i) is enough, and both must agree."""
    if not 0 < clip < math.inf:
        raise RebelError(f"a margin clipped at {clip:g} says nothing; use a positive number of nats, such as {CLIP:g}")
    known = probabilities[~torch.isnan(probabilities) & ~_diagonal(probabilities)]
    wrong = known[(known < 0) | (known > 1)]
    if len(wrong):
        raise RebelError(f"the probability {float(wrong[0]):g} is not between 0 and 1; give P(first > second)")
    logits = probabilities.logit().clamp(-clip, clip)
    whole = _both_ways(logits, f"a probability P(i > j) has to be 1 - P(j > i), up to {CLOSE:g}")
    return checked_margins(whole)


def margins_of_numbers(count: int, margins: Sequence[Margin]) -> Float[Tensor, "G G"]:
    """The matrix of margins given one by one; the same pair may stand there in both orders, with opposite signs.

    Repeated ones in the same order are averaged.
    """
    given: dict[tuple[int, int], list[float]] = {}
    for margin in margins:
        _check_places(margin.first, margin.second, count)
        if not math.isfinite(margin.value):
            raise RebelError(f"the margin of {margin.first} over {margin.second} is {margin.value}; {NOT_COMPARED}")
        given.setdefault((margin.first, margin.second), []).append(float(margin.value))
    matrix = _empty(count)
    for (first, second), values in given.items():
        matrix[first, second] = sum(values) / len(values)
    return checked_margins(_both_ways(matrix, SIGN))


NOT_COMPARED = "leave out pairs that nobody compared, and give a finite number for all others"
SIGN = "a margin is positive where the first is better, so that of (j, i) is minus that of (i, j)"


def checked_margins(margins: Float[Tensor, "G G"]) -> Float[Tensor, "G G"]:
    """The matrix, if it is one of margins: antisymmetric, finite, NaN (both ways) where nobody compared."""
    if torch.isinf(margins).any():
        raise RebelError(f"a margin is infinite; {NOT_COMPARED}")
    if not torch.equal(margins.isnan(), margins.isnan().T):
        raise RebelError("a margin is NaN in one order and a number in the other; a pair is compared or it is not")
    whole = _both_ways(margins, SIGN)
    if not whole[~_diagonal(whole)].isfinite().any():
        raise RebelError("no two of the completions are compared: every margin is NaN")
    return whole


def _both_ways(matrix: Float[Tensor, "G G"], rule: str) -> Float[Tensor, "G G"]:
    """The antisymmetric matrix; an entry that is NaN is filled from its mirror image, and two have to agree."""
    apart = (matrix + matrix.T).masked_fill(_diagonal(matrix), 0.0).nan_to_num(nan=0.0).abs()
    wrong = (apart > CLOSE * matrix.abs().clamp(min=1.0).nan_to_num(nan=1.0)).nonzero()
    if len(wrong):
        i, j = wrong[0].tolist()
        raise RebelError(
            f"the margin of {i} over {j} is {float(matrix[i, j]):g} and that of {j} over {i} is "
            f"{float(matrix[j, i]):g}: they contradict each other; {rule}"
        )
    whole = torch.where(matrix.isnan(), -matrix.T, matrix)
    return whole.masked_fill(_diagonal(matrix), 0.0)


def _share(vote: Vote) -> float:
    if vote.share is None or math.isnan(vote.share):
        raise RebelError(
            f"the vote on {vote.first} and {vote.second} has no winner; leave it out, or count it as a tie: 0.5"
        )
    if not 0 <= vote.share <= 1:
        raise RebelError(
            f"the vote on {vote.first} and {vote.second} is {vote.share:g}; give 1 for the first, 0 for the second, "
            "0.5 for a tie, or a share between"
        )
    return float(vote.share)


def _check_places(first: int, second: int, count: int) -> None:
    for place in (first, second):
        if not 0 <= place < count:
            raise RebelError(f"completion {place} is compared, and the prompt has {count}; places count from 0")
    if first == second:
        raise RebelError(f"completion {first} is compared with itself; leave such pairs out")


def _empty(count: int) -> Float[Tensor, "G G"]:
    return torch.full((count, count), math.nan, dtype=torch.float64)


def _diagonal(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
