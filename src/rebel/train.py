"""The loop: for t in range(T): draw and score -> regress -> evaluate -> report -> checkpoint.

It sees protocols only; which model, sampler and rewards they are is `build`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from rebel import measures
from rebel.checkpoint import Progress
from rebel.collect import Drawn, Interrupted, Source, collect, score_chunks
from rebel.data import seed_of
from rebel.errors import RunStopped
from rebel.evaluate import Evaluation, LogProbs, evaluate
from rebel.fit import Regression, fit
from rebel.learner import Learner
from rebel.types import LogProb, Prompt

DRAW, SHUFFLE, EVALUATE = range(3)
"""Streams of random numbers that must not meet."""


@runtime_checkable
class Hooks(Protocol):
    """Whoever watches over a run: it is told how it goes, keeps what resumes it, and may end it."""

    def phase(self, name: str, total: int) -> AbstractContextManager[Callable[[int], None]]: ...
    def iterated(self, progress: Progress) -> None: ...
    def evaluation_is_due(self, progress: Progress) -> bool: ...
    def report(self, progress: Progress, metrics: dict[str, float], evaluation: Evaluation | None) -> None: ...
    def stop(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is made of."""

    learner: Learner
    source: Source
    regression: Regression
    reference: LogProb | None
    evaluation: Source | None
    evaluation_prompts: Sequence[Prompt]
    prompts: int
    replace_flat: float
    max_failed: float
    seed: int
    hooks: Hooks
    mixed: Callable[[LogProbs], LogProbs] | None = None
    """Where the mixture of iterates is evaluated: its log-probabilities from those of the policy as it is."""

    @property
    def evaluated(self) -> str:
        """Which policy evaluations are of."""
        return "mixture" if self.mixed else "averaged" if self.learner.average else "last"


def train(run: Run, progress: Progress, iterations: int) -> None:
    """Carry out the iterations that are left, or fewer if the hooks say so; `progress` tells where it stands."""
    if progress.iteration == 0:
        finish(run, progress, {}, due=True)
    while progress.iteration < iterations and not run.hooks.stop():
        try:
            metrics = iterate(run, progress)
        except Interrupted:
            return
        finish(
            run,
            progress,
            metrics,
            due=progress.iteration == iterations or run.hooks.evaluation_is_due(progress),
        )


def iterate(run: Run, progress: Progress) -> measures.Measures:
    """One iteration of REBEL; moves `progress` on and returns what was measured."""
    drawn = draw(run, progress)
    metrics = measures.of_draws(drawn.groups, drawn.kept)
    check_failures(metrics, drawn, run.max_failed)
    order = seed_of(run.seed, SHUFFLE, progress.iteration)
    metrics |= fit(run.learner, run.reference, drawn.kept, run.regression, order, run.hooks.phase)
    progress.iteration += 1
    progress.step = run.learner.steps
    progress.samples += sum(len(group.rollout.completions) for group in drawn.groups)
    progress.prompts_taken += len(drawn.groups)
    return metrics | speeds(drawn, metrics)


def draw(run: Run, progress: Progress) -> Drawn:
    """The groups of this iteration, from the policy as it is now."""
    run.source.sampler.refresh()
    with run.hooks.phase("sampling", run.prompts * run.source.group_size) as done:
        return collect(
            run.source,
            start=progress.prompts_taken,
            prompts=run.prompts,
            replace_flat=run.replace_flat,
            seed=seed_of(run.seed, DRAW, progress.iteration),
            stop=run.hooks.stop,
            done=done,
        )


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


def finish(run: Run, progress: Progress, metrics: measures.Measures, due: bool) -> None:
    """Evaluate if it is time to, and tell the hooks."""
    began = time.perf_counter()
    if progress.iteration:
        run.hooks.iterated(progress)
    evaluation = None
    if run.evaluation and due:
        with run.learner.use_average():
            evaluation = run_evaluation(run, run.evaluation)
        metrics["seconds/evaluation"] = time.perf_counter() - began
    metrics["seconds/total"] = sum((value for name, value in metrics.items() if name.startswith("seconds/")), 0.0)
    run.hooks.report(progress, metrics, evaluation)


def run_evaluation(run: Run, source: Source) -> Evaluation:
    """The same prompts with the same random numbers every time, so that evaluations differ by the policy alone."""
    with run.hooks.phase("evaluating", len(run.evaluation_prompts) * source.group_size) as done:
        groups, _, _ = score_chunks(source, run.evaluation_prompts, seed_of(run.seed, EVALUATE), done=done)

    def scored_by(log_prob: LogProb) -> Callable:
        return lambda traces: run.learner.score(log_prob, traces)

    reference = scored_by(run.reference) if run.reference else None
    own = scored_by(run.learner.policy.log_prob)
    found = evaluate(groups, run.mixed(own) if run.mixed else own, reference)
    return replace(found, policy=run.evaluated)


def speeds(drawn: Drawn, metrics: measures.Measures) -> measures.Measures:
    """Seconds of the first half, and tokens per second of both."""
    tokens = sum(measures.length(c) for group in drawn.groups for c in group.rollout.completions)
    return {
        "seconds/sampling": drawn.sampling,
        "seconds/rewards": drawn.scoring,
        "tokens_per_second_sampling": tokens / max(drawn.sampling, 1e-9),
        "tokens_per_second_training": tokens / max(metrics["seconds/scoring"] + metrics["seconds/training"], 1e-9),
    }
