"""The loop: for t in range(T): draw and score -> regress -> evaluate -> report -> checkpoint.

It sees protocols only; which model, sampler and rewards they are is `build`'s business.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from rebel import measures
from rebel.checkpoint import Progress
from rebel.collect import Drawn, Interrupted, Watch
from rebel.data import seed_of
from rebel.errors import RunStopped
from rebel.evaluate import Evaluation
from rebel.fit import Regression, fit
from rebel.learner import Learner
from rebel.types import LogProb

DRAW, SHUFFLE, EVALUATE = range(3)
"""Streams of random numbers that must not meet."""


@runtime_checkable
class Hooks(Watch, Protocol):
    """Whoever watches over a run: it is told how it goes, keeps what resumes it, and may end it."""

    def iterated(self, progress: Progress) -> None: ...
    def noted(self) -> dict[str, float]: ...
    def evaluation_is_due(self, progress: Progress) -> bool: ...
    def report(self, progress: Progress, metrics: dict[str, float], evaluation: Evaluation | None) -> None: ...


@runtime_checkable
class Collector(Protocol):
    """The scored groups of an iteration, from wherever they come: drawn now, drawn before, or somebody else's."""

    def __call__(self, learner: Learner, progress: Progress, seed: int, watch: Watch) -> Drawn: ...


@runtime_checkable
class Evaluator(Protocol):
    """How good the policy is now. The same seed every time, so that evaluations differ by the policy alone."""

    def __call__(self, learner: Learner, reference: LogProb | None, seed: int, watch: Watch) -> Evaluation: ...


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is made of."""

    learner: Learner
    collector: Collector
    regression: Regression
    reference: LogProb | None
    evaluator: Evaluator | None
    max_failed: float
    seed: int
    hooks: Hooks


def train(run: Run, progress: Progress, iterations: int) -> None:
    """Carry out the iterations that are left, or fewer if the hooks say so; `progress` tells where it stands."""
    if progress.iteration == 0:
        finish(run, progress, {}, last=False)
    while progress.iteration < iterations and not run.hooks.stop():
        try:
            metrics = iterate(run, progress)
        except Interrupted:
            return
        finish(run, progress, metrics, last=progress.iteration == iterations)


def iterate(run: Run, progress: Progress) -> measures.Measures:
    """One iteration of REBEL; moves `progress` on and returns what was measured."""
    drawn = run.collector(run.learner, progress, seed_of(run.seed, DRAW, progress.iteration), run.hooks)
    metrics = measures.of_draws(drawn.groups, drawn.kept)
    check_failures(metrics, drawn, run.max_failed)
    order = seed_of(run.seed, SHUFFLE, progress.iteration)
    metrics |= fit(run.learner, run.reference, drawn.kept, run.regression, order, run.hooks.phase, drawn.anchor)
    if not drawn.fresh:
        metrics["r2_in_sample"] = metrics.pop("r2_held_out")
    progress.iteration += 1
    progress.step = run.learner.steps
    progress.samples += sum(len(group.rollout.completions) for group in drawn.groups) if drawn.fresh else 0
    progress.prompts_taken += len(drawn.groups)
    return metrics | speeds(drawn, metrics)


def check_failures(metrics: measures.Measures, drawn: Drawn, most: float) -> None:
    """Stop a run whose rewards fail too often: it would learn from a biased remainder."""
    count = sum(len(group.rollout.completions) for group in drawn.groups)
    failed = metrics["failed_rewards"] / count
    if failed > most:
        raise RunStopped(
            f"{failed:.0%} of this iteration's {count} completions had no usable reward (NaN, infinite or no value); "
            f"--max_failed_rewards allows {most:.0%}. Mend the reward and resume"
        )
    if not drawn.kept:
        raise RunStopped(
            f"no group of this iteration has two completions left to compare: {failed:.0%} had no usable reward, "
            f"{metrics['unfinished']:.0%} were cut off by the length limit, which --drop_truncated leaves out. Mend "
            "the reward and resume, or start again with a longer --max_completion_length"
        )


def finish(run: Run, progress: Progress, metrics: measures.Measures, last: bool) -> None:
    """Evaluate at the beginning, at the end and when it is time to, and tell the hooks."""
    began = time.perf_counter()
    if progress.iteration:
        run.hooks.iterated(progress)
    noted = run.hooks.noted()
    evaluation = None
    if run.evaluator and (last or not progress.iteration or run.hooks.evaluation_is_due(progress)):
        evaluation = evaluated(run, run.evaluator)
        metrics["seconds/evaluation"] = time.perf_counter() - began
    metrics["seconds/total"] = sum((value for name, value in metrics.items() if name.startswith("seconds/")), 0.0)
    run.hooks.report(progress, noted | metrics, evaluation)


def evaluated(run: Run, evaluator: Evaluator) -> Evaluation:
    """The averaged iterate, if one is kept, else the last one, as the evaluator sees it.

    What rewards and samplers note down meanwhile is of the evaluation too, unless that has a number of the same name.
    """
    run.hooks.noted()  # what an iteration that was given up has left
    with run.learner.use_average():
        evaluation = evaluator(run.learner, run.reference, seed_of(run.seed, EVALUATE), run.hooks)
    noted = {f"eval/{name}": value for name, value in run.hooks.noted().items()}
    return replace(evaluation, metrics=noted | evaluation.metrics)


def speeds(drawn: Drawn, metrics: measures.Measures) -> measures.Measures:
    """Seconds of the first half, and tokens per second of both; images per second where completions have no tokens."""
    completions = [c for group in drawn.groups for c in group.rollout.completions]
    tokens = sum(map(measures.length, completions))
    unit, count = ("tokens", tokens) if tokens else ("images", len(completions))
    new = count if drawn.tokens is None else drawn.tokens
    return {
        "seconds/sampling": drawn.sampling,
        "seconds/rewards": drawn.scoring,
        **({f"{unit}_per_second_sampling": new / drawn.sampling} if new and drawn.sampling else {}),
        f"{unit}_per_second_training": count / max(metrics["seconds/scoring"] + metrics["seconds/training"], 1e-9),
    }
