"""Micro-batches: which traces go through the model together, by what they cost. They have no say in the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

Cost = Callable[[Sequence[Any]], int]
"""What traces cost in one micro-batch together: tokens, for text. Together may be less than apart."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A micro-batch: places of its traces in the minibatch, and of its groups if it holds them whole."""

    traces: tuple[int, ...]
    groups: tuple[int, ...] | None = None


def plan(groups: Sequence[Sequence[Any]], cost: Cost, budget: int) -> list[Piece]:
    """Micro-batches of a minibatch: of whole groups where they fit, else of even parts of groups."""
    ends = list(accumulate(map(len, groups)))
    places = [tuple(range(end - len(group), end)) for end, group in zip(ends, groups, strict=True)]
    small = [k for k, group in enumerate(groups) if cost(group) <= budget]
    whole = [
        Piece(joined(places[small[i]] for i in batch), tuple(small[i] for i in batch))
        for batch in fill([groups[k] for k in small], cost, budget)
    ]
    large = [k for k in range(len(groups)) if k not in set(small)]
    loose = [(k, cut) for k in large for cut in parts(groups[k], cost, budget)]
    split = fill([groups[k][cut] for k, cut in loose], cost, budget)
    return whole + [Piece(joined(places[loose[i][0]][loose[i][1]] for i in batch)) for batch in split]


def pieces_of(traces: Sequence[Any], cost: Cost, budget: int) -> list[Piece]:
    """Micro-batches of traces that need not stay together; those that cost less together do, as far as they fit."""
    runs = [run[cut] for run in bundles(traces, cost) for cut in parts(run, cost, budget)]
    ends = list(accumulate(map(len, runs)))
    places = [range(end - len(run), end) for end, run in zip(ends, runs, strict=True)]
    return [Piece(joined(places[i] for i in batch)) for batch in fill(runs, cost, budget)]


def bundles(traces: Sequence[Any], cost: Cost) -> list[list[Any]]:
    """Runs of neighbours, each of which costs less together with the one before it than apart from it."""
    alone = [cost([trace]) for trace in traces]
    found: list[list[Any]] = []
    for k, trace in enumerate(traces):
        if k and cost(traces[k - 1 : k + 1]) < alone[k - 1] + alone[k]:
            found[-1].append(trace)
        else:
            found.append([trace])
    return found


def parts(group: Sequence[Any], cost: Cost, budget: int) -> list[slice]:
    """The fewest cuts of a group into runs of like number that fit the budget; one trace alone may be beyond it."""
    for count in range(1, len(group)):
        if all(cost(group[cut]) <= budget for cut in cuts(len(group), count)):
            return cuts(len(group), count)
    return cuts(len(group), len(group))


def cuts(length: int, count: int) -> list[slice]:
    """So many runs of like length."""
    return [slice(a, b) for a, b in pairwise(length * k // count for k in range(count + 1))]


def fill(items: Sequence[Sequence[Any]], cost: Cost, budget: int) -> list[list[int]]:
    """Indices of the items, each of traces that stay together, in few micro-batches of at most `budget`, and even ones.

    Items of like cost come together, so that little is padded; an item beyond the budget is alone.
    """
    prices = [cost(item) for item in items]
    order = sorted(range(len(items)), key=lambda i: -prices[i])
    few = greedy(items, order, cost, budget)
    mean = sum(cost(joined(items[i] for i in batch)) for batch in few) / max(len(few), 1)
    limits = [mean + slack * max(prices, default=0) for slack in (0, 1 / 4, 1 / 2, 1)]
    even = (greedy(items, order, cost, min(budget, math.ceil(limit))) for limit in limits)
    return next((batches for batches in even if len(batches) == len(few)), few)


def greedy(items: Sequence[Sequence[Any]], order: Sequence[int], cost: Cost, budget: int) -> list[list[int]]:
    """Items in this order, in each batch as many of the next as fit."""
    batches: list[list[int]] = []
    left = list(order)
    while left:
        count = most_that_fit([items[i] for i in left], cost, budget)
        batches.append(left[:count])
        left = left[count:]
    return batches


def most_that_fit(items: Sequence[Sequence[Any]], cost: Cost, budget: int) -> int:
    """How many of the first items fit together, at least one: found in few questions, for each costs its length."""
    fit, beyond = 1, 2
    while beyond <= len(items) and cost(joined(items[:beyond])) <= budget:
        fit, beyond = beyond, 2 * beyond
    beyond = min(beyond, len(items) + 1)
    while beyond - fit > 1:
        middle = (fit + beyond) // 2
        fit, beyond = (middle, beyond) if cost(joined(items[:middle])) <= budget else (fit, middle)
    return fit


def joined(runs: Iterable[Sequence[Any]]) -> tuple[Any, ...]:
    """The runs one after the other."""
    return tuple(item for run in runs for item in run)


def share(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece | None]:
    """What one of `world` processes does: all do the same number, the missing ones are None (weight zero)."""
    padded = [*pieces, *[None] * (-len(pieces) % world)]
    return padded[rank::world]
