"""Ways to tell how good the policy is: each draws or reads what it needs and measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rebel.collect import Source, Watch, score_chunks
from rebel.evaluate import Evaluation, evaluate
from rebel.learner import Learner
from rebel.types import LogProb, Prompt


@dataclass(frozen=True, slots=True)
class ByReward:
    """The reward of fresh completions of prompts that are never trained on."""

    source: Source
    prompts: Sequence[Prompt]

    def __call__(self, learner: Learner, reference: LogProb | None, seed: int, watch: Watch) -> Evaluation:
        with watch.phase("evaluating", len(self.prompts) * self.source.group_size) as done:
            groups, _, _ = score_chunks(self.source, self.prompts, seed, done=done)

        def scored_by(log_prob: LogProb) -> Callable:
            return lambda traces: learner.score(log_prob, traces)

        return evaluate(groups, scored_by(learner.policy.log_prob), scored_by(reference) if reference else None)
