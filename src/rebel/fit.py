"""The second half of an iteration: theta_{t+1} by least squares, how well it fits, and how far it moved the policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from rebel import measures
from rebel.algorithm import (
    Fit,
    Objective,
    collate,
    explained,
    regress,
    regression_batch,
    total,
    trace_weights,
)
from rebel.data import shuffled
from rebel.learner import Learner
from rebel.stepsize import StepRule
from rebel.types import OWN, LogProb, Pairing, Scored
from rebel.way import Moved, meet

Phase = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True)
class Regression:
    """How an iteration regresses: minibatches of whole groups, pairs, step and price of the KL.

    With another objective than REBEL's nothing is regressed, and no fit is measured.
    """

    steps: int
    passes: int
    pairing: Pairing
    step_rule: StepRule
    beta: float = 0.0
    held_out: float = 0.0
    objective: Objective = trace_weights
    lam: float = 1.0
    """How much of what later stretches of a completion brought is credited to one, where that is known."""

    @property
    def regresses(self) -> bool:
        return self.objective is trace_weights


@dataclass(frozen=True, slots=True)
class Problem:
    """The groups of an iteration with log pi_t and log pi_ref by index (where known), and the step eta'."""

    groups: Sequence[Scored]
    anchor: dict[int, Tensor]
    reference: dict[int, Tensor]
    step: float
    goal: float | None


def fit(
    learner: Learner,
    reference: LogProb | None,
    groups: Sequence[Scored],
    how: Regression,
    seed: int,
    phase: Phase,
    known: Mapping[int, Tensor] | None = None,
) -> measures.Measures:
    """Regress one iteration's groups onto their rewards; returns what was measured on the way.

    pi_t is the policy as it is now, but for the groups whose log pi_t is `known`.
    """
    began = time.perf_counter()
    held, minibatches = split(len(groups), how, seed)
    with phase("scoring", 1) as done:
        problem = pose(learner, reference, groups, how, minibatches, known or {})
        done(1)
    scored = time.perf_counter()
    with phase("training", len(minibatches)) as done:
        start = learner.depart() if problem.goal else None
        fits = take_steps(learner, problem, how, minibatches, held, done)
        moved = meet(learner, start, problem.goal, how.step_rule.leeway, groups) if start and problem.goal else Moved()
    probe = held or last_seen(fits)
    after = score(learner, learner.policy.log_prob, groups, probe)
    ended = time.perf_counter()
    return {
        **(of_regression(problem, how, fits, probe, after, bool(held)) if how.regresses else {}),
        **of_probe(problem, probe, after),
        **of_anchors(problem),
        **({} if moved.kl is None else {"kl_iteration": moved.kl}),
        "scale": moved.scale,
        "grad_norm": learner.grad_norm,
        "learning_rate": learner.learning_rate,
        "seconds/scoring": scored - began,
        "seconds/training": ended - scored,
    }


def split(count: int, how: Regression, seed: int) -> tuple[list[int], list[list[int]]]:
    """Indices held out of training, and those of each optimiser step, shuffled anew for each pass."""
    order = shuffled(count, seed)
    held, rest = order[: int(count * how.held_out)], order[int(count * how.held_out) :]
    steps = min(how.steps, len(rest))
    minibatches = []
    for number in range(how.passes):
        mixed = [rest[k] for k in shuffled(len(rest), seed, number)]
        minibatches += [mixed[k::steps] for k in range(steps)]
    return held, minibatches


def pose(
    learner: Learner,
    reference: LogProb | None,
    groups: Sequence[Scored],
    how: Regression,
    minibatches: Sequence[Sequence[int]],
    known: Mapping[int, Tensor],
) -> Problem:
    """Anchors of all but the first minibatch (which needs none), references of all, and the step."""
    everyone = range(len(groups))
    unseen = [i for i in everyone if i not in {*minibatches[0], *known}]
    anchor = {**known, **score(learner, learner.policy.log_prob, groups, unseen)}
    given = score(learner, reference, groups, everyone) if reference else {}
    shaping = {i: total(anchor[i] - given[i]) for i in anchor if i in given} if how.beta else {}
    variance = measures.margin_variance(groups, shaping, how.beta)
    rule = how.step_rule
    return Problem(groups, anchor, given, rule.step(variance), rule.goal(variance))


def score(learner: Learner, log_prob: LogProb, groups: Sequence[Scored], which: Iterable[int]) -> dict[int, Tensor]:
    """log-probabilities of some groups in the columns of the regression, by index."""
    which = list(which)
    if not which:
        return {}
    logp = learner.columns(log_prob, [trace for i in which for trace in groups[i].rollout.traces])
    return dict(zip(which, logp.split([len(groups[i].rollout.completions) for i in which]), strict=True))


def take_steps(
    learner: Learner,
    problem: Problem,
    how: Regression,
    minibatches: Sequence[Sequence[int]],
    held: Sequence[int],
    done: Callable[[int], None],
) -> list[Fit]:
    """One optimiser step a minibatch, until the policy no longer fits what is held out; returns what the steps saw."""
    fits: list[Fit] = []
    fitted: list[float] = []
    for now in regress(
        problem.groups,
        minibatches,
        learner.update,
        pairing=how.pairing,
        step=problem.step,
        beta=how.beta,
        anchor=problem.anchor,
        reference=problem.reference,
        objective=how.objective,
        lam=how.lam,
    ):
        fits.append(now)
        done(1)
        if held:
            fitted.append(held_out_fit(learner, problem, how, held))
            if max(fitted) > max(fitted[-2:]):
                break
    return fits


def last_seen(fits: Sequence[Fit]) -> list[int]:
    """Groups of the last minibatch to measure on, so few that it costs little beside the steps: a quarter of them."""
    regressed = sum(len(now.groups) for now in fits)
    return list(fits[-1].groups[: max(1, regressed // 4)])


def held_out_fit(learner: Learner, problem: Problem, how: Regression, held: Sequence[int]) -> float:
    return r_squared_of(problem, how, score(learner, learner.policy.log_prob, problem.groups, held))


def r_squared_of(problem: Problem, how: Regression, logp: dict[int, Tensor]) -> float:
    """R^2 of the regression on some groups at these log-probabilities."""
    batch = collate(
        [
            regression_batch(
                problem.groups[i],
                how.pairing,
                problem.anchor[i],
                problem.reference.get(i),
                how.beta,
                len(logp),
                how.lam,
            )
            for i in logp
        ]
    )
    residual, total = explained(torch.cat(list(logp.values())), batch, problem.step).tolist()
    return 1 - residual / total if total else math.nan


def of_regression(
    problem: Problem,
    how: Regression,
    fits: Sequence[Fit],
    probe: Sequence[int],
    after: dict[int, Tensor],
    held: bool,
) -> measures.Measures:
    """Loss and fit of the regression, before the steps and after the last one, and its step."""
    name = "r2_held_out" if held else "r2_in_sample"
    return measures.of_fits(fits, problem.step) | {name: r_squared_of(problem, how, after), "eta": problem.step}


def of_probe(problem: Problem, probe: Sequence[int], after: dict[int, Tensor]) -> measures.Measures:
    """Movement after the last step, on the groups held out or on those of the last minibatch."""
    log_ratios = [total(after[i] - problem.anchor[i]) for i in probe]
    groups = [problem.groups[i] for i in probe]
    own = [moved[measures.drawn_by_policy(group)] for group, moved in zip(groups, log_ratios, strict=True)]
    return {
        **({"kl_iteration": measures.half_variance(torch.cat(own))} if any(map(len, own)) else {}),
        **measures.best_and_worst(groups, log_ratios),
        **measures.log_ratios_of(groups, log_ratios, "logratio"),
    }


def of_anchors(problem: Problem) -> measures.Measures:
    """Entropy per token and KL to the initial policy, of pi_t on the completions that it drew itself."""
    groups = {i: problem.groups[i] for i in problem.anchor}
    own = {i: measures.drawn_by_policy(group) for i, group in groups.items()}
    drawn = [c for group in groups.values() for c in group.rollout.completions if c.source == OWN]
    tokens = sum(map(measures.length, drawn))
    nats = float(sum(problem.anchor[i][own[i]].sum() for i in groups))
    away = {i: total(problem.anchor[i] - problem.reference[i]) for i in groups if i in problem.reference}
    from_own = [away[i][own[i]] for i in away]
    found = {"entropy": -nats / tokens} if tokens else {}
    found |= {"kl_initial": float(torch.cat(from_own).mean())} if any(map(len, from_own)) else {}
    return found | measures.log_ratios_of([groups[i] for i in away], list(away.values()), "logratio_initial")
