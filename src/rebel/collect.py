"""The first half of an iteration: prompts are drawn from, completions scored, unusable ones set aside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from accelerate.utils import gather_object
from torch import Tensor

from rebel.checkpoint import Progress
from rebel.data import PromptStream, seed_of
from rebel.errors import RebelError, RunStopped
from rebel.gains import credited
from rebel.learner import Learner
from rebel.rewards.groups import Scale, drop_unfinished, flat, penalise_unfinished, scaled, usable
from rebel.types import Prompt, Reward, Rollout, Sampler, Scored


class Interrupted(Exception):
    """Asked to stop while nothing of the iteration had been learnt yet."""


@runtime_checkable
class Watch(Protocol):
    """Whoever follows what is going on: it shows phases, and may ask for an end."""

    def phase(self, name: str, total: int) -> AbstractContextManager[Callable[..., None]]: ...
    def stop(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Who draws and who scores, and this process's share of it."""

    sampler: Sampler
    reward: Reward
    stream: PromptStream
    group_size: int
    chunk: int
    penalty: float = 0.0
    drop_unfinished: bool = False
    scale: Scale = "none"
    rank: int = 0
    world: int = 1

    def regressed(self, groups: list[Scored]) -> list[Scored]:
        """What is left to regress of scored groups, in the unit of the regression."""
        left = [drop_unfinished(group) for group in groups] if self.drop_unfinished else groups
        usable_ones = map(usable, scaled([group for group in left if group is not None], self.scale))
        return credited([group for group in usable_ones if group is not None])


@dataclass(frozen=True, slots=True)
class Drawn:
    """All groups of an iteration, those of them that are fit for the regression, and what it took.

    `anchor` has log pi_t of the kept groups, by index, where pi_t is no longer the policy as it is now. `fresh` is
    false where the groups have been regressed before. `tokens` were drawn in the seconds of sampling, where those are
    not the tokens of the groups.
    """

    groups: Sequence[Scored]
    kept: Sequence[Scored]
    sampling: float
    scoring: float
    anchor: Mapping[int, Tensor] = field(default_factory=dict)
    fresh: bool = True
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Online:
    """Every iteration draws the next prompts of the stream anew from the policy as it is now, which is pi_t."""

    source: Source
    prompts: int
    replace_flat: float = 0.0

    def __call__(self, learner: Learner, progress: Progress, seed: int, watch: Watch) -> Drawn:
        began = time.perf_counter()
        self.source.sampler.refresh()
        refreshed = time.perf_counter() - began
        with watch.phase("sampling", self.prompts * self.source.group_size) as done:
            drawn = collect(
                self.source,
                start=progress.prompts_taken,
                prompts=self.prompts,
                replace_flat=self.replace_flat,
                seed=seed,
                stop=watch.stop,
                done=done,
            )
        return replace(drawn, sampling=drawn.sampling + refreshed)


@dataclass(frozen=True, slots=True)
class Ahead:
    """While an iteration is trained the completions of the next one are drawn: by pi_{t-1}, where pi_t is the anchor.

    The regression holds for any sampling distribution, without importance weights. The first iteration of a run, or
    of one that is resumed, has nothing drawn before it and draws from pi_t itself. The sampler must draw from the
    policy as it was at the last `refresh`, by means that training does not use.
    """

    source: Source
    prompts: int
    iterations: int
    drawing: dict[int, Future[list[Rollout]]] = field(default_factory=dict)

    def __call__(self, learner: Learner, progress: Progress, seed: int, watch: Watch) -> Drawn:
        began = time.perf_counter()
        with watch.phase("sampling", self.prompts * self.source.group_size) as done:
            rollouts = self.rollouts(progress, seed, watch, done)
        following = progress.iteration + 1
        if following < self.iterations:
            taken = progress.prompts_taken + self.prompts
            self.drawing[following] = in_background(lambda: self.draw(taken, seed_of(seed, 1), watch))
        drew = time.perf_counter()
        groups = scored(self.source, rollouts, self.prompts)
        took = time.perf_counter() - drew
        return Drawn(groups, self.source.regressed(groups), drew - began, took, tokens=0)

    def rollouts(self, progress: Progress, seed: int, watch: Watch, done: Callable[[int], None]) -> list[Rollout]:
        """Those of this iteration. Afterwards the sampler has the policy as it is now, and nothing to do."""
        drawn_before = self.drawing.pop(progress.iteration, None)
        if drawn_before is None:
            self.source.sampler.refresh()
            return self.draw(progress.prompts_taken, seed_of(seed, 0), watch, done)
        rollouts = drawn_before.result()
        done(self.prompts * self.source.group_size)
        if progress.iteration + 1 < self.iterations:
            self.source.sampler.refresh()
        return rollouts

    def draw(
        self, start: int, seed: int, watch: Watch, done: Callable[[int], None] = lambda count: None
    ) -> list[Rollout]:
        return draw(self.source, self.source.stream.take(start, self.prompts), seed, watch.stop, done)


def in_background(work: Callable[[], list[Rollout]]) -> Future[list[Rollout]]:
    """What `work` is going to return or raise, from a thread that an exit does not wait for."""
    future: Future[list[Rollout]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as failure:  # to be raised by whoever asks for the result
            future.set_exception(failure)

    threading.Thread(target=run, name="rebel-ahead", daemon=True).start()
    return future


def collect(
    source: Source,
    start: int,
    prompts: int,
    replace_flat: float,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda count: None,
) -> Drawn:
    """Groups of the next `prompts` of the stream; up to `replace_flat` times as many again in place of flat ones."""
    most = prompts + int(replace_flat * prompts)
    groups: list[Scored] = []
    kept: list[Scored] = []
    sampling = scoring = 0.0
    wanted = prompts
    while wanted:
        asked = source.stream.take(start + len(groups), wanted)
        new, drew, took = score_chunks(source, asked, seed_of(seed, len(groups)), stop, done)
        groups, sampling, scoring = groups + new, sampling + drew, scoring + took
        kept = source.regressed(groups)
        fit = sum(not flat(group) for group in kept)
        wanted = min(prompts - fit, most - len(groups)) if replace_flat else 0
    return Drawn(groups, sorted(kept, key=flat)[:prompts] if replace_flat else kept, sampling, scoring)


def score_chunks(
    source: Source,
    prompts: Sequence[Prompt],
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    done: Callable[[int], None] = lambda count: None,
) -> tuple[list[Scored], float, float]:
    """The scored groups of these prompts, with the seconds of sampling and of scoring."""
    began = time.perf_counter()
    rollouts = draw(source, prompts, seed, stop, done)
    source.sampler.close()  # a reward model may need the memory
    drew = time.perf_counter()
    groups = scored(source, rollouts, len(prompts))
    return groups, drew - began, time.perf_counter() - drew


def scored(source: Source, rollouts: Sequence[Rollout], prompts: int) -> list[Scored]:
    """The groups of all `prompts` from this process's rollouts, and those of the others."""
    own = together(source.world, lambda: source.reward(rollouts) if rollouts else [])
    return gather([penalise_unfinished(group, source.penalty) for group in own], source, prompts)


def draw(
    source: Source,
    prompts: Sequence[Prompt],
    seed: int,
    stop: Callable[[], bool],
    done: Callable[[int], None],
) -> list[Rollout]:
    """This process's chunks of the prompts. A chunk's seed depends on its place alone, not on who draws it."""
    rollouts: list[Rollout] = []
    for number, chunk in enumerate(chunks(prompts, source.chunk)):
        if number % source.world != source.rank:
            continue
        if source.world == 1 and stop():  # processes must stop at the same place
            raise Interrupted
        for rollout in source.sampler(chunk, source.group_size, seed_of(seed, number)):
            rollouts.append(rollout)
            done(len(rollout.completions))
    return rollouts


def together(world: int, score: Callable[[], list[Scored]]) -> list[Scored]:
    """What `score` returns. Where it fails on one process it does so on all: none may wait for another."""
    scored: list[Scored] = []
    failure: Exception | None = None
    try:
        scored = score()
    except (RunStopped, RebelError) as stopped:
        failure = stopped
    if world > 1:
        kind = RebelError if isinstance(failure, RebelError) else RunStopped
        others = [other for other in gather_object([failure and (kind, str(failure))]) if other]
        failure = failure or (others[0][0](others[0][1]) if others else None)
    if failure:
        raise failure
    return scored


def gather(scored: list[Scored], source: Source, count: int) -> list[Scored]:
    """The groups of all processes, in the order of their prompts."""
    if source.world == 1:
        return scored
    places = [
        place
        for number, chunk in enumerate(chunks(range(count), source.chunk))
        if number % source.world == source.rank
        for place in chunk
    ]
    everyone = gather_object(list(zip(places, scored, strict=True)))
    return [group for _, group in sorted(everyone, key=lambda item: item[0])]


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
