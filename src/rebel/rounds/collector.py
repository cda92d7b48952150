"""Large-batch iterations: rollouts of a whole prompt set, drawn, scored and anchored once, then regressed in parts.

A round is the paper's iteration. Its stages work shard by shard and go on where they were interrupted. Then the loop's
iterations walk through the stored groups, anchored at the policy of the round's beginning.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from accelerate.utils import gather_object
from torch import Tensor

from rebel.checkpoint import Progress, rng_state, set_rng_state
from rebel.collect import Drawn, Interrupted, Source, Watch, chunks, together
from rebel.data import seed_of, shuffled
from rebel.errors import RebelError, RunStopped
from rebel.evaluate import length
from rebel.learner import Learner
from rebel.rewards.groups import kept, penalise_unfinished
from rebel.rounds.rollouts import (
    Manifest,
    Rollouts,
    claim,
    numbers,
    numbers_table,
    of_weights,
    read_manifest,
    rewards_table,
    table_of,
    write_json,
)
from rebel.rounds.shards import Shards, State, digest
from rebel.types import Pairing, Prompt, Reward, Rollout, Sampler, Scored

DRAW_ROUND, ORDER_ROUND, SCORE_ROUND = range(3, 6)
"""Streams of random numbers that meet neither each other nor those of the loop."""

Found = TypeVar("Found")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes that share a stage, whoever watches over it, and where it says what it finds."""

    watch: Watch
    say: Say
    rank: int = 0
    world: int = 1

    def agreed(self, find: Callable[[], Found]) -> Found:
        """What `find` returns on the first process, on all of them; where it fails there, it does so on all."""
        if self.world == 1:
            return find()
        found: Any = None
        failure: Exception | None = None
        try:
            found = find() if self.rank == 0 else None
        except (RunStopped, RebelError) as reason:
            failure = reason
        found, failure = gather_object([(found, failure)])[0]
        if failure:
            raise failure
        return found


# -- the stages ------------------------------------------------------------------------------------------------------


def draw(
    rollouts: Rollouts,
    sampler: Sampler,
    prompts: Callable[[int], Sequence[Prompt]],
    group_size: int,
    chunk: int,
    crew: Crew,
) -> int:
    """Draw the shards that are missing; returns how many tokens that took. `prompts` gives those of a shard.

    What a shard holds depends on the policy, the run's seed, the round and the shard's number alone.
    """
    manifest = rollouts.manifest
    todo = crew.agreed(lambda: rollouts.completions.states(rollouts.shards, lambda shard: manifest.identity))
    tokens = 0

    def make(shard: int, done: Callable[..., None]) -> None:
        nonlocal tokens
        seed = seed_of(manifest.seed, DRAW_ROUND, manifest.round, shard)
        drawn: list[Rollout] = []
        for number, some in enumerate(chunks(prompts(shard), chunk)):
            if crew.world == 1 and crew.watch.stop():  # processes must stop at the same place
                raise Interrupted
            for rollout in sampler(some, group_size, seed_of(seed, number)):
                drawn.append(rollout)
                new = sum(map(length, rollout.completions))
                tokens += new
                done(1, tokens=new)
        rollouts.completions.write(shard, table_of(drawn), manifest.identity)

    by_shard("sampling", rollouts, todo, make, crew)
    sampler.close()
    return tokens


def score(rollouts: Rollouts, reward: Reward, crew: Crew) -> None:
    """Score the shards that have no rewards yet."""
    todo = crew.agreed(lambda: rollouts.rewards.states(rollouts.shards, rollouts.of_completions))

    def make(shard: int, done: Callable[..., None]) -> None:
        drawn = rollouts.drawn(shard)
        with own_chance(seed_of(rollouts.manifest.seed, SCORE_ROUND, rollouts.manifest.round, shard)):
            scored = reward(drawn)
        rollouts.rewards.write(shard, rewards_table(scored), rollouts.of_completions(shard))
        done(len(drawn))

    by_shard("rewards", rollouts, todo, make, crew)


def anchor(rollouts: Rollouts, anchors: Shards, of: Callable[[int], str], learner: Learner, crew: Crew) -> None:
    """Compute log pi_t, by the policy as it is now, of the shards that have none yet; all processes share each."""
    todo = crew.agreed(lambda: anchors.states(rollouts.shards, of))

    def make(shard: int, done: Callable[..., None]) -> None:
        drawn = rollouts.drawn(shard)
        logp = learner.score(learner.policy.log_prob, [trace for rollout in drawn for trace in rollout.traces])
        if crew.rank == 0:
            parts = logp.split([len(rollout.completions) for rollout in drawn])
            anchors.write(shard, numbers_table({"logp": parts}), of(shard))
        done(len(drawn))

    by_shard("anchors", rollouts, todo, make, replace(crew, rank=0, world=1))
    learner.accelerator.wait_for_everyone()


def by_shard(
    name: str,
    rollouts: Rollouts,
    todo: dict[int, State],
    make: Callable[[int, Callable[..., None]], None],
    crew: Crew,
) -> None:
    """Make the shards that are to be made, dealt out to the processes; says what was found broken."""
    for shard, state in todo.items():
        if state != "missing":
            crew.say(f"{name}: shard {shard} of {rollouts.folder} is {state}; it is made again")
    left = sum(rollouts.size(shard) for shard in todo)
    if 0 < left < len(rollouts):
        crew.say(f"{name}: {len(rollouts) - left:,} of {len(rollouts):,} prompts are done already")
    with crew.watch.phase(name, len(rollouts)) as done:
        done(len(rollouts) - left)
        for wave in chunks(list(todo), crew.world):
            if crew.watch.stop():
                raise Interrupted
            together(crew.world, lambda wave=wave: made(wave[crew.rank], make, done) if crew.rank < len(wave) else [])
            done(sum(rollouts.size(shard) for place, shard in enumerate(wave) if place != crew.rank))


def made(shard: int, make: Callable[[int, Callable[..., None]], None], done: Callable[..., None]) -> list[Scored]:
    make(shard, done)
    return []


@contextmanager
def own_chance(seed: int) -> Iterator[None]:
    """Within this context the generators that a reward may use start from this seed; afterwards they are as before."""
    before = rng_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(before)


def unscored(rollouts: Sequence[Rollout]) -> list[Scored]:
    """The reward of a run whose rollouts have been scored before: there is none."""
    raise RebelError("there is no reward to score with: give --reward_funcs")


def check_whole(rollouts: Rollouts) -> None:
    """Raises RebelError where completions are missing or damaged."""
    lacking = rollouts.completions.states(rollouts.shards, lambda shard: rollouts.manifest.identity)
    if lacking:
        raise RebelError(
            f"{rollouts.folder} is not complete: {listed(lacking)} of its {rollouts.shards} shards of completions. "
            "Make them by the `rebel rollout` that made the others"
        )


def check_scored(rollouts: Rollouts) -> None:
    """Raises RebelError where rewards are missing or damaged."""
    lacking = rollouts.rewards.states(rollouts.shards, rollouts.of_completions)
    if lacking:
        raise RebelError(
            f"{rollouts.folder} is not scored: {listed(lacking)} of its {rollouts.shards} shards of rewards. "
            f"Score them by: rebel score {rollouts.folder} --reward_funcs ..."
        )


def listed(states: dict[int, State]) -> str:
    """`2 missing, 1 damaged (shard 7)`."""
    kinds = {state: [shard for shard, own in states.items() if own == state] for state in states.values()}
    return ", ".join(
        f"{len(shards)} {state} (shard {shards[0]}{' ...' * (len(shards) > 1)})" for state, shards in kinds.items()
    )


# -- the loop's part -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rounds:
    """Collects the groups of an iteration from the rollouts of its round, and makes these when a round begins.

    `given` are rollouts made before; without them every round draws `size` prompts anew into a folder below `home`,
    described by `manifest(round, policy)`. An iteration takes about `prompts` groups, each lap over them all in
    another order.
    """

    source: Source
    home: Path
    size: int
    prompts: int
    pairing: Pairing
    seed: int
    say: Say
    laps: int = 1
    given: Rollouts | None = None
    manifest: Callable[[int, str], Manifest] | None = None
    ready: set[int] = field(default_factory=set)

    @property
    def per_lap(self) -> int:
        """Iterations of one lap over the rollouts of a round."""
        return -(-self.size // self.prompts)

    @property
    def per_round(self) -> int:
        return self.laps * self.per_lap

    def __call__(self, learner: Learner, progress: Progress, seed: int, watch: Watch) -> Drawn:
        number, place = divmod(progress.iteration, self.per_round)
        crew = Crew(watch, self.say, self.source.rank, self.source.world)
        took = Took()
        if number not in self.ready:
            took = self.begin(number, learner, crew) if place == 0 else self.go_on(number, crew)
            self.ready.add(number)
        began = time.perf_counter()
        drawn = self.read(number, place)
        reading = time.perf_counter() - began
        return replace(drawn, sampling=took.sampling, scoring=took.scoring + reading, tokens=took.tokens)

    def folder(self, number: int) -> Path:
        return self.home / f"{number:05d}"

    def rollouts(self, number: int) -> Rollouts:
        return Rollouts(self.folder(number), read_manifest(self.folder(number))) if self.given is None else self.given

    def anchors(self, number: int) -> Shards:
        return Shards(self.folder(number) / "anchors")

    def begin(self, number: int, learner: Learner, crew: Crew) -> Took:
        """Draw, score and anchor the rollouts of a round by the policy as it is now, as far as that is not done."""
        policy = of_weights(learner.policy.scorer)
        began = time.perf_counter()
        tokens = 0
        if self.given is None:
            tokens = self.draw(number, policy, crew)
        drew = time.perf_counter()
        rollouts = self.rollouts(number)
        if self.given is None:
            score(rollouts, self.source.reward, crew)
        crew.agreed(lambda: write_json(self.anchors(number).folder / "policy.json", policy))
        anchor(rollouts, self.anchors(number), self.of_anchors(number, policy), learner, crew)
        took = Took(drew - began, time.perf_counter() - drew, tokens)
        drawn = f"{tokens:,} tokens drawn in {took.sampling:.0f} s, " if tokens else ""
        crew.say(f"round {number + 1}: {len(rollouts):,} prompts, {drawn}scored and anchored in {took.scoring:.0f} s")
        return took

    def draw(self, number: int, policy: str, crew: Crew) -> int:
        """The completions of a round; returns how many tokens were drawn."""
        assert self.manifest is not None, "rounds that are not given are described"
        described, source = self.manifest(number, policy), self.source
        rollouts = crew.agreed(lambda: claim(self.folder(number), described))
        source.sampler.refresh()
        first = number * self.size

        def prompts(shard: int) -> list[Prompt]:
            return source.stream.take(first + shard * described.shard, rollouts.size(shard))

        return draw(rollouts, source.sampler, prompts, source.group_size, source.chunk, crew)

    def go_on(self, number: int, crew: Crew) -> Took:
        """Look through what a round made before it was interrupted. Its policy is gone, and no longer needed."""
        began = time.perf_counter()
        crew.agreed(lambda: self.check(number))
        if self.given is None:
            score(self.rollouts(number), self.source.reward, crew)
        return Took(0.0, time.perf_counter() - began)

    def check(self, number: int) -> None:
        """Raises RebelError where completions or anchors were lost, which nothing can make again now."""
        rollouts, anchors = self.rollouts(number), self.anchors(number)
        path = anchors.folder / "policy.json"
        of = self.of_anchors(number, json.loads(path.read_text()) if path.exists() else "")
        lost = {
            "completions": rollouts.completions.states(rollouts.shards, lambda shard: rollouts.manifest.identity),
            "anchors": anchors.states(rollouts.shards, of),
        }
        found = [f"{name}: {listed(states)}" for name, states in lost.items() if states]
        if found:
            raise RebelError(
                f"of the rollouts that this run is in the middle of, {'; '.join(found)}. They belong to the policy of "
                f"iteration {number * self.per_round}: resume from a checkpoint of that iteration, or start again"
            )

    def of_anchors(self, number: int, policy: str) -> Callable[[int], str]:
        """What anchors are made of: the completions and the policy that is pi_t."""
        rollouts = self.rollouts(number)
        return lambda shard: digest(f"{rollouts.of_completions(shard)} {policy}")

    def read(self, number: int, place: int) -> Drawn:
        """The groups of an iteration, with log pi_t of those completions that will be compared."""
        rollouts, anchors = self.rollouts(number), self.anchors(number)
        lap, part = divmod(place, self.per_lap)
        groups: list[Scored] = []
        known: dict[int, Tensor] = {}
        for index in self.chosen(number, lap, part):
            shard, row = rollouts.place(index)
            group = penalise_unfinished(rollouts[index], self.source.penalty)
            logp = numbers(anchors.table(shard), "logp", row)
            known |= {id(c): own for c, own in zip(group.rollout.completions, logp, strict=True)}
            groups.append(group)
        left = [compared(group, self.pairing) for group in self.source.regressed(groups)]
        regressed = [group for group in left if group]
        anchor = {k: torch.stack([known[id(c)] for c in g.rollout.completions]) for k, g in enumerate(regressed)}
        return Drawn(groups, regressed, 0.0, 0.0, anchor, fresh=lap == 0)

    def chosen(self, number: int, lap: int, part: int) -> list[int]:
        """The groups of one iteration of a lap: parts of like size, neighbours on disk read together."""
        order = shuffled(self.size, self.seed, ORDER_ROUND, number, lap)
        return sorted(order[part * self.size // self.per_lap : (part + 1) * self.size // self.per_lap])


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds that the stages of a round took, scoring with the anchors, and tokens drawn."""

    sampling: float = 0.0
    scoring: float = 0.0
    tokens: int = 0


def compared(group: Scored, pairing: Pairing) -> Scored | None:
    """The group with only the completions that are in a pair: no others have to be scored in the regression."""
    pairs = pairing(group.pair_margins())
    keep = torch.zeros(len(group.rollout.completions), dtype=torch.bool)
    keep[pairs.reshape(-1)] = True
    return kept(group, keep)
