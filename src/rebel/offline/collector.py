"""Learning from completions that somebody else wrote: the same loop, with the initial policy as its anchor throughout.

An iteration takes the next groups of the data, so a lap of the stream is an epoch. pi_t of the regression is pi_0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor

from rebel import measures
from rebel.algorithm import collate, explained, rebel_loss, regression_batch
from rebel.checkpoint import Progress
from rebel.collect import Drawn, Watch, chunks, together
from rebel.data import laps
from rebel.evaluate import Evaluation, mean
from rebel.learner import Learner
from rebel.offline.anchors import AnchorFile
from rebel.offline.recorded import Groups
from rebel.rewards.groups import Scale, scaled, usable
from rebel.stepsize import AutoEta, StepRule
from rebel.types import LogProb, Pairing, Reward, Scored

CHUNK = 256
"""Groups that are scored at once."""


@dataclass
class Recordings:
    """Recorded groups with what the initial policy and the rewards make of them, found out once, before the first step.

    Rewards and log-probabilities stand in the order of the data's completions.
    """

    groups: Groups
    file: AnchorFile
    reward: Reward | None = None
    say: Callable[[str], None] = print
    logp: Float[Tensor, " N"] | None = None
    rewards: Float[Tensor, " N"] | None = None
    components: dict[str, Tensor] = field(default_factory=dict)
    spread: float = math.nan

    def prepare(self, learner: Learner, watch: Watch) -> None:
        """Find out what is not known yet. The policy of the learner has to be the initial one until then."""
        if self.logp is not None:
            return
        if self.reward is not None:
            self.score(learner, self.reward, watch)
        self.logp = self.kept_anchors(learner)
        if self.logp is None:
            assert learner.steps == 0, "anchors are those of the initial policy"
            self.logp = self.new_anchors(learner, watch)
            if learner.accelerator.is_main_process:
                self.file.write(self.logp)
        self.spread = measures.margin_variance(iter(self), {}, 0.0)

    def kept_anchors(self, learner: Learner) -> Tensor | None:
        """The anchors on disk, if every process can read them."""
        found, wrong = self.file.read(self.groups.completions)
        several = learner.accelerator.num_processes > 1
        if wrong and learner.accelerator.is_main_process:
            self.say(f"anchors: {wrong}; they are computed again")
        return found if all(gather_object([found is not None]) if several else [found is not None]) else None

    def new_anchors(self, learner: Learner, watch: Watch) -> Float[Tensor, " N"]:
        """log pi_0 of all completions; every process scores its share."""
        found = []
        with watch.phase("anchors", len(self.groups)) as done:
            for places in chunks(range(len(self.groups)), CHUNK):
                traces = [trace for k in places for trace in self.groups[k].rollout.traces]
                found.append(learner.score(learner.policy.log_prob, traces))
                done(len(places))
        return torch.cat(found).double()

    def score(self, learner: Learner, reward: Reward, watch: Watch) -> None:
        """The rewards of all completions; every process scores its share of the groups."""
        rank, world = learner.accelerator.process_index, learner.accelerator.num_processes
        scored: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        with watch.phase("scoring", len(self.groups)) as done:
            for places in chunks(range(len(self.groups)), CHUNK):
                own = places[rank::world]
                rollouts = [self.groups[k].rollout for k in own]
                new = together(world, lambda rollouts=rollouts: reward(rollouts) if rollouts else [])
                scored += [(k, rewards_of(g), dict(g.components)) for k, g in zip(own, new, strict=True)]
                done(len(places))
        everyone = sorted(gather_object(scored) if world > 1 else scored, key=lambda item: item[0])
        self.rewards = torch.cat([rewards for _, rewards, _ in everyone])
        names = everyone[0][2]
        self.components = {name: torch.cat([parts[name] for _, _, parts in everyone]) for name in names}

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, k: int) -> Scored:
        """Group k with its rewards or margins."""
        group, span = self.groups[k], self.groups.span(k)
        if self.rewards is None:
            return group
        components = {name: values[span] for name, values in self.components.items()}
        return Scored(group.rollout, rewards=self.rewards[span], components=components)

    def __iter__(self) -> Iterator[Scored]:
        return (self[k] for k in range(len(self)))

    def anchor(self, k: int) -> Float[Tensor, " G"]:
        """log pi_0 of the completions of group k."""
        assert self.logp is not None, "prepare comes first"
        return self.logp[self.groups.span(k)]


def rewards_of(group: Scored) -> Float[Tensor, " G"]:
    assert group.rewards is not None, "recorded completions are scored by rewards"
    return group.rewards


@dataclass(frozen=True, slots=True)
class Offline:
    """Every iteration takes the next groups of the data, in an order that is new in every epoch."""

    recordings: Recordings
    prompts: int
    seed: int
    scale: Scale = "none"

    def __call__(self, learner: Learner, progress: Progress, seed: int, watch: Watch) -> Drawn:
        self.recordings.prepare(learner, watch)
        began = time.perf_counter()
        start = progress.prompts_taken
        places = laps(len(self.recordings), self.seed, start, self.prompts)
        groups = scaled([self.recordings[k] for k in places], self.scale)
        fit = [(k, group, left) for k, group in zip(places, groups, strict=True) if (left := usable(group))]
        return Drawn(
            groups=groups,
            kept=[left for _, _, left in fit],
            sampling=0.0,
            scoring=time.perf_counter() - began,
            anchor={i: self.recordings.anchor(k)[staying(*pair)] for i, (k, *pair) in enumerate(fit)},
            fresh=start + self.prompts <= len(self.recordings),
        )


def staying(group: Scored, left: Scored) -> list[int]:
    """Places of the completions that are left of a group."""
    remaining = {id(completion) for completion in left.rollout.completions}
    return [place for place, completion in enumerate(group.rollout.completions) if id(completion) in remaining]


@dataclass(frozen=True, slots=True)
class EtaOfData:
    """eta: auto with one step for the whole run, from the spread of all margins: the anchor never moves either."""

    recordings: Recordings
    beta: float

    def step(self, variance: float) -> float:
        return AutoEta(self.beta).step(self.recordings.spread)

    def goal(self, variance: float) -> None:
        return None

    @property
    def leeway(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class ByPairs:
    """How well the policy orders recorded completions that are never trained on, and how well it explains margins."""

    recordings: Recordings
    pairing: Pairing
    step_rule: StepRule
    scale: Scale = "none"

    def __call__(self, learner: Learner, reference: LogProb | None, seed: int, watch: Watch) -> Evaluation:
        self.recordings.prepare(learner, watch)
        groups, anchors, now = [], [], []
        with watch.phase("evaluating", len(self.recordings)) as done:
            for places in chunks(range(len(self.recordings)), CHUNK):
                whole = [(k, self.recordings[k]) for k in places]
                fit = [(k, group, left) for k, group in whole if (left := usable(group))]
                logp = learner.score(learner.policy.log_prob, [t for *_, left in fit for t in left.rollout.traces])
                now += logp.split([len(left.rollout.completions) for *_, left in fit])
                anchors += [self.recordings.anchor(k)[staying(group, left)] for k, group, left in fit]
                groups += [left for *_, left in fit]
                done(len(places))
        policy = "averaged" if learner.average else "last"
        return Evaluation(self.metrics(scaled(groups, self.scale), anchors, now), [], policy)

    def metrics(self, groups: Sequence[Scored], anchors: Sequence[Tensor], now: Sequence[Tensor]) -> dict[str, float]:
        """Accuracy on pairs with its standard error over groups, and the regression's own numbers."""
        step = self.step_rule.step(measures.margin_variance(groups, {}, 0.0))
        batch = collate(
            [
                regression_batch(group, self.pairing, anchor, prompts=len(groups))
                for group, anchor in zip(groups, anchors, strict=True)
            ]
        )
        logp = torch.cat(list(now))
        residual, total = explained(logp, batch, step).tolist()
        log_ratios = [new - old for new, old in zip(now, anchors, strict=True)]
        right = [accuracy(group.pair_margins(), moved) for group, moved in zip(groups, log_ratios, strict=True)]
        known = torch.tensor([share for share in right if not math.isnan(share)], dtype=torch.float64)
        return {
            "eval/accuracy": float(known.mean()),
            "eval/accuracy_stderr": float(known.std() / math.sqrt(len(known))) if len(known) > 1 else math.nan,
            "eval/r2": 1 - residual / total if total else math.nan,
            "eval/loss": float(rebel_loss(logp, batch, step)),
            **{f"eval/{name}": value for name, value in measures.best_and_worst(groups, log_ratios).items()},
            "eval/length": mean(measures.length(c) for group in groups for c in group.rollout.completions),
        }


def accuracy(margins: Float[Tensor, "G G"], log_ratio: Float[Tensor, " G"]) -> float:
    """The share of a group's decided pairs that the log-ratios order as the margins do; equal ones count one half."""
    first, second = torch.triu_indices(*margins.shape, offset=1)
    margin, gap = margins[first, second], log_ratio[first] - log_ratio[second]
    decided = margin.nan_to_num(nan=0.0) != 0
    return mean((0.5 * (1 + (gap * margin.to(gap)).sign()))[decided].tolist())
