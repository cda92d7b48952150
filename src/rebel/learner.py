"""Moves the policy: optimiser steps along sum(c * grad log pi), trace by trace, on accelerate.

A micro-batch is filled by what its traces cost (tokens, for text) and has no say in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from rebel.algorithm import Weigh
from rebel.credit import Known, spread, trajectory
from rebel.errors import RunStopped
from rebel.micro_batches import Piece, pieces_of, plan, share
from rebel.types import Credit, LogProb, Policy


@dataclass(frozen=True, slots=True)
class Departure:
    """The weights and the average from which an iteration set out."""

    weights: list[Tensor]
    averaged: list[Tensor]


@dataclass
class Found:
    """What this process has found of the log-probabilities of `count` traces; the others' are zero."""

    count: int
    logp: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.logp = torch.zeros(self.count, dtype=torch.float64)

    def note(self, places: Sequence[int], columns: Float[Tensor, "n *C"], wanted: bool) -> None:
        """Take in those of some traces. The number of columns is known from the first of them, wanted or not."""
        if self.logp.shape[1:] != columns.shape[1:]:
            self.logp = self.logp.new_zeros(self.count, *columns.shape[1:])
        if wanted:
            self.logp[list(places)] = columns.to(self.logp)


@dataclass
class Learner:
    """A policy with its optimiser.

    `average` is the memory of the averaged iterate as a share of all steps; 0 for none. `credit` says what of a
    trajectory is regressed.
    """

    accelerator: Accelerator
    policy: Policy
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    budget: int
    max_grad_norm: float = 0.0
    average: float = 0.0
    credit: Credit = trajectory
    steps: int = 0
    grad_norm: float = math.nan
    averaged: list[Tensor] = field(default_factory=list)
    forgotten: float = 1.0

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [weight for weight in self.module.parameters() if weight.requires_grad]

    def score(self, log_prob: LogProb, traces: Sequence[Any]) -> Float[Tensor, " N"]:
        """log pi(y|x) of the traces, in nats; every process scores its share and all get the numbers."""
        return self.columns(log_prob, traces, trajectory)

    @torch.no_grad()
    def columns(self, log_prob: LogProb, traces: Sequence[Any], credit: Credit | None = None) -> Float[Tensor, "N *C"]:
        """The same in the columns of the regression."""
        pieces = pieces_of(traces, self.policy.cost, self.budget)
        found = Found(len(traces))
        for piece in share(pieces, self.accelerator.process_index, self.accelerator.num_processes):
            places = piece.traces if piece else (0,)
            with self.accelerator.autocast():
                own = (credit or self.credit)(log_prob([traces[i] for i in places]))
            found.note(places, own, piece is not None)
        return self.total(found.logp)

    def update(self, groups: Sequence[Sequence[Any]], weigh: Weigh) -> Float[Tensor, "N *C"]:
        """One optimiser step along sum(c * grad log pi); returns the log-probabilities from before it.

        A micro-batch of whole groups finds its own c from its forward pass. Groups that are too large for one
        are scored first, without gradient; both give the same gradient.
        """
        traces = [trace for group in groups for trace in group]
        pieces = plan(groups, self.policy.cost, self.budget)
        given = self.weights_of_split_groups(groups, pieces, weigh)
        mine = share(pieces, self.accelerator.process_index, self.accelerator.num_processes)
        found = Found(len(traces))
        for number, piece in enumerate(mine):
            with nullcontext() if number + 1 == len(mine) else self.accelerator.no_sync(self.module):
                self.back_propagate(piece, traces, weigh, given, found)
        self.step()
        return self.total(found.logp)

    def weights_of_split_groups(
        self, groups: Sequence[Sequence[Any]], pieces: Sequence[Piece], weigh: Weigh
    ) -> dict[int, Tensor]:
        """c of the traces whose groups do not fit into one micro-batch, by place in the minibatch."""
        loose = {place for piece in pieces if piece.groups is None for place in piece.traces}
        if not loose:
            return {}
        starts = [sum(map(len, groups[:k])) for k in range(len(groups))]
        large = [k for k in range(len(groups)) if starts[k] in loose]
        places = [starts[k] + i for k in large for i in range(len(groups[k]))]
        logp = self.columns(self.policy.log_prob, [trace for k in large for trace in groups[k]])
        return dict(zip(places, weigh(large, logp), strict=True))

    def back_propagate(
        self, piece: Piece | None, traces: Sequence[Any], weigh: Weigh, given: dict[int, Tensor], found: Found
    ) -> None:
        """The backward pass of one micro-batch; `found` notes its log-probabilities. None: a filler, weight zero."""
        places = piece.traces if piece else (0,)

        world = self.accelerator.num_processes  # DDP takes the mean over processes, where the sum is meant

        def weights(own: Float[Tensor, "n S"]) -> Float[Tensor, "n S"]:
            assert piece is not None and piece.groups is not None, "others are known"
            pull = weigh(piece.groups, self.credit(own).to("cpu", torch.float64))
            return spread((pull * world).to(own), own.shape[1])

        known = None if piece and piece.groups else Known(self.known(piece, given) * world)
        with self.accelerator.autocast():
            own = self.policy.backward([traces[i] for i in places], known or weights, self.accelerator.backward)
        found.note(places, self.credit(own), piece is not None)

    def known(self, piece: Piece | None, given: dict[int, Tensor]) -> Float[Tensor, "n *C"]:
        """c of a micro-batch of parts of groups; zero for a filler."""
        return torch.stack([given[i] for i in piece.traces]) if piece else torch.zeros(1, dtype=torch.float64)

    def step(self) -> None:
        """Clip, step, and take the new iterate into the average."""
        limit = self.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        self.grad_norm = float(norm) if norm is not None else math.nan
        if not math.isfinite(self.grad_norm) and self.accelerator.scaler is None:
            raise RunStopped(
                f"the gradient of optimiser step {self.steps + 1} is {self.grad_norm}; nothing was updated"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.take_into_average()

    @torch.no_grad()
    def take_into_average(self) -> None:
        """The average remembers about the last `average` share of all steps: it starts short and grows with the run."""
        if not self.average:
            return
        if not self.averaged:
            self.averaged = [weight.detach().clone() for weight in self.weights]
        gain = min(1.0, 1.0 / (self.average * self.steps))
        self.forgotten *= 1.0 - gain
        for mean, weight in zip(self.averaged, self.weights, strict=True):
            mean.lerp_(weight, gain)

    @torch.no_grad()
    def depart(self) -> Departure:
        """Where the weights and their average are now, to measure and to scale the way from here."""
        self.forgotten = 1.0
        return Departure([w.detach().clone() for w in self.weights], [a.clone() for a in self.averaged])

    @torch.no_grad()
    def scale_way(self, start: Departure, scale: float) -> None:
        """As if every weight had gone `scale` times as far from `start`; the average follows."""
        for now, then in zip(self.weights, start.weights, strict=True):
            now.copy_(then + scale * (now - then))
        kept = self.forgotten if start.averaged else 0.0
        befores = start.averaged or start.weights
        for mean, then, before in zip(self.averaged, start.weights, befores, strict=bool(self.averaged)):
            mean.copy_(scale * mean + (1 - scale) * (kept * before + (1 - kept) * then))

    @contextmanager
    def use_average(self) -> Iterator[None]:
        """Within this context the policy is the averaged iterate, if one is kept."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        for mean, weight in zip(self.averaged, self.weights if self.averaged else [], strict=True):
            kept = weight.detach().clone()
            weight.copy_(mean)
            mean.copy_(kept)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over processes."""
        if self.accelerator.num_processes == 1:
            return numbers
        summed: Any = self.accelerator.reduce(numbers.to(self.accelerator.device), reduction="sum")
        return summed.cpu()

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def learner(
    accelerator: Accelerator,
    policy: Policy,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], Any],
    **settings: Any,
) -> Learner:
    """A learner of `policy`, whose scorer accelerate has prepared for this machine and number of processes."""
    optim = optimizer([w for w in policy.scorer.parameters() if w.requires_grad])
    module, optim = accelerator.prepare(policy.scorer, optim)
    return Learner(accelerator, replace(policy, scorer=module), module, optim, scheduler(optim), **settings)
