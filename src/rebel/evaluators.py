"""Ways to tell how good the policy is: each draws or reads what it needs and measures it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import broadcast_object_list

from rebel.against import Contents, Duel, duel, paired
from rebel.collect import Source, Watch, score_chunks
from rebel.errors import RebelError, RunStopped
from rebel.evaluate import Evaluation, LogProbs, evaluate, reward_metrics
from rebel.learner import Learner
from rebel.types import Judge, LogProb, Prompt, Reward, Rollout, Scored


@dataclass(frozen=True, slots=True)
class ByReward:
    """The reward of fresh completions of prompts that are never trained on."""

    source: Source
    prompts: Sequence[Prompt]
    mixed: Callable[[LogProbs], LogProbs] | None = None
    """Where a mixture of iterates draws: its log-probabilities from those of the policy as it is."""
    show: int = 8
    """How many completions are kept for the eye."""

    def __call__(self, learner: Learner, reference: LogProb | None, seed: int, watch: Watch) -> Evaluation:
        return self.measured(self.draw(seed, watch), learner, reference)

    def draw(self, seed: int, watch: Watch) -> list[Scored]:
        """Fresh completions, scored; the same on every process."""
        self.source.sampler.refresh()  # the policy may be the averaged one for now
        with watch.phase("evaluating", len(self.prompts) * self.source.group_size) as done:
            return score_chunks(self.source, self.prompts, seed, done=done)[0]

    def measured(self, groups: Sequence[Scored], learner: Learner, reference: LogProb | None) -> Evaluation:
        def scored_by(log_prob: LogProb) -> LogProbs:
            return lambda traces: learner.score(log_prob, traces)

        own = scored_by(learner.policy.log_prob)
        own = self.mixed(own) if self.mixed else own
        found = evaluate(groups, own, scored_by(reference) if reference else None, self.show)
        return replace(found, policy=self.of(learner))

    def of(self, learner: Learner) -> str:
        """Which policy is evaluated."""
        return "mixture" if self.mixed else "averaged" if learner.average else "last"


Opponents = Callable[[Learner, Sequence[Rollout], int], Contents]
"""The completions of the other side for the prompts of these rollouts, from the learner as it is now and a seed."""


@dataclass(frozen=True, slots=True)
class ByJudge:
    """The reward as before, and how often a judge prefers the same completions to those of the other side."""

    of: ByReward
    judge: Judge
    opponents: Opponents
    measure: Callable[[Any], int]

    def __call__(self, learner: Learner, reference: LogProb | None, seed: int, watch: Watch) -> Evaluation:
        groups = self.of.draw(seed, watch)
        evaluation = self.of.measured(groups, learner, reference)

        def judged() -> Duel:
            ours = [group.rollout for group in groups]
            with watch.phase("judging", 2 * sum(len(rollout.completions) for rollout in ours)):
                return duel(self.judge, paired(ours, self.opponents(learner, ours, seed)), self.measure, seed)

        metrics = on_main(learner, lambda: judged().metrics())
        return replace(evaluation, metrics={**evaluation.metrics, **metrics})


@dataclass(frozen=True, slots=True)
class WithJudges:
    """The reward as before, and what judges that nothing is trained on make of the same completions."""

    of: ByReward
    judges: Reward
    """Its components are the judges, by name."""

    def __call__(self, learner: Learner, reference: LogProb | None, seed: int, watch: Watch) -> Evaluation:
        groups = self.of.draw(seed, watch)
        evaluation = self.of.measured(groups, learner, reference)
        metrics = on_main(learner, lambda: verdicts(self.judges([group.rollout for group in groups])))
        return replace(evaluation, metrics={**evaluation.metrics, **metrics})


def verdicts(judged: Sequence[Scored]) -> dict[str, float]:
    """Each judge's mean over prompts, with its standard error, as a reward's."""
    apart = {name: [replace(group, rewards=group.components[name]) for group in judged] for name in names(judged)}
    found = {name: reward_metrics(groups) for name, groups in apart.items()}
    return {
        f"eval/judges/{name}{end}": metrics[f"eval/reward{end}"]
        for name, metrics in found.items()
        for end in ("", "_stderr")
    }


def names(judged: Sequence[Scored]) -> list[str]:
    return list(judged[0].components) if judged else []


def on_main(learner: Learner, work: Callable[[], Any]) -> Any:
    """What `work` returns on the main process, on all of them; what it raises there is raised on all."""
    accelerator = learner.accelerator
    result: Any = None
    if accelerator.is_main_process:
        try:
            result = work()
        except (RebelError, RunStopped) as failure:
            result = failure
    if accelerator.num_processes > 1:
        result = broadcast_object_list([result])[0]
    if isinstance(result, Exception):
        raise result
    return result
