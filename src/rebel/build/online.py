"""Settings -> the parts of a run that learns from what the policy draws: anew in every iteration, or in rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rebel.build.credit import credit_in_words
from rebel.build.evaluation import build_evaluator
from rebel.build.length import iterations_of
from rebel.build.rewards import for_evaluation
from rebel.build.rounds import build_rounds, in_rounds, in_words
from rebel.build.sampler import TextSampler, build_generate, build_sampler, who_draws
from rebel.collect import Ahead, Online, Source
from rebel.config import RebelConfig
from rebel.data import PromptStream
from rebel.errors import RebelError
from rebel.evaluators import ByReward
from rebel.iterates import Iterates
from rebel.learner import Learner
from rebel.offline.collector import Recordings
from rebel.pairing import all_pairs, best_against_worst, random_pairs
from rebel.policies.causal_lm import CausalLM
from rebel.rewards.beginnings import WithBeginnings
from rebel.rewards.functions import Notes
from rebel.rounds.collector import Say, unscored
from rebel.samplers.hybrid import FromColumns, Hybrid
from rebel.samplers.mixture import Mixture
from rebel.stepsize import AutoEta, GivenEta, StepRule
from rebel.train import Collector, Evaluator
from rebel.types import Judge, Pairing, Prompt, Reward, Sampler

PAIRINGS: dict[str, Pairing] = {"all": all_pairs, "extremes": best_against_worst, "random": random_pairs}

Prompts = tuple[Sequence[Prompt], Sequence[Prompt]]
"""Those to train on, and those to evaluate on."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a run's groups come from, how it is evaluated and how long its steps are.

    `recordings` have to see the initial policy before a checkpoint may take its place; `checks` may refuse the learner
    before its first step. `per_round` is the number of iterations that a checkpoint must not fall between, 0 where they
    stand alone.
    """

    collector: Collector
    evaluator: Evaluator | None
    step_rule: StepRule
    recordings: tuple[Recordings, ...] = ()
    notes: tuple[str, ...] = ()
    per_round: int = 0
    checks: tuple[Callable[[Learner], None], ...] = ()


def build_step_rule(config: RebelConfig) -> StepRule:
    if config.eta == "auto":
        return AutoEta(config.beta, config.kl_per_iteration)
    return GivenEta(float(config.eta), config.beta, config.kl)


def online_parts(
    config: RebelConfig,
    learner: Learner,
    reward: Reward | None,
    prompts: Prompts,
    judge: Judge | None,
    iterates: Iterates | None,
    say: Say,
    notes: Notes,
) -> Parts:
    """Groups drawn from the policy, which is evaluated by the reward of what it draws."""
    policy = learner.policy
    assert isinstance(policy, CausalLM), "build_policy made it"
    sampler = build_sampler(config, policy, learner.accelerator, prompts[0], notes.log_metric)
    source = build_source(config, learner, sampler, reward or unscored, prompts[0])
    # a sampler that draws for the next iteration has other things to do
    free = build_generate(config, policy, learner.accelerator) if config.one_step_ahead else sampler
    evaluator = evaluation(config, source, free, prompts[1], judge, iterates) if prompts[1] and reward else None
    rule = build_step_rule(config)
    if config.credit == "stretch":
        cut = policy.stretches
        early = WithBeginnings(source.reward, policy.completion, cut.tokens, cut.count, notes.aside)
        source = replace(source, reward=early)
    if in_rounds(config):
        rounds = build_rounds(config, source, prompts[0], PAIRINGS[config.pairing], policy, say)
        return Parts(rounds, evaluator, rule, notes=(in_words(config, rounds.size),), per_round=rounds.per_round)
    lines = (*who_draws(config), *credit_in_words(config))
    if config.data_completions:
        mixed, line = hybrid(sampler, prompts[0], config)
        source, lines = replace(source, sampler=mixed), (*lines, line)
    return Parts(build_collector(config, source, prompts[0]), evaluator, rule, notes=lines)


def build_collector(config: RebelConfig, source: Source, prompts: Sequence[Prompt]) -> Collector:
    """Where the groups of an iteration come from: drawn in it, or during the one before."""
    if config.one_step_ahead:
        return Ahead(source, config.prompts_per_iteration, iterations_of(config, prompts))
    return Online(source, config.prompts_per_iteration, config.replace_flat_groups)


def hybrid(sampler: TextSampler, prompts: Sequence[Prompt], config: RebelConfig) -> tuple[Hybrid, str]:
    """The sampler with the completions of --data_columns beside its own, and a line for the plan."""
    beside = FromColumns(sampler.policy, tuple(config.data_columns), config.max_completion_length)
    counts = [len(beside(prompt)) for prompt in prompts]
    if not any(counts):
        raise RebelError(
            f"--data_columns {' '.join(config.data_columns)}: no prompt has a completion there of at most "
            f"--max_completion_length {config.max_completion_length} tokens"
        )
    fewer = sum(count < config.data_completions for count in counts)
    note = f"hybrid       {config.data_completions} of {config.num_generations} completions are the data's"
    return Hybrid(sampler, beside, config.data_completions), note + (
        f"; {fewer:,} prompts have fewer, and smaller groups" if fewer else ""
    )


def build_source(
    config: RebelConfig, learner: Learner, sampler: Sampler, reward: Reward, prompts: Sequence[Prompt]
) -> Source:
    """Who draws and who scores for training."""
    return Source(
        sampler=sampler,
        reward=reward,
        stream=PromptStream(prompts, config.seed),
        group_size=config.num_generations,
        chunk=max(1, config.sampling_batch // config.num_generations),
        penalty=config.missing_eos_penalty or 0.0,
        drop_unfinished=config.drop_truncated,
        scale=config.scale_rewards,
        rank=learner.accelerator.process_index,
        world=learner.accelerator.num_processes,
    )


def evaluation(
    config: RebelConfig,
    source: Source,
    sampler: TextSampler,
    prompts: Sequence[Prompt],
    judge: Judge | None,
    iterates: Iterates | None,
) -> Evaluator:
    """By the reward of completions of held-out prompts, and by a judge where one follows the run."""
    heat = config.temperature if config.eval_temperature is None else config.eval_temperature
    cool = replace(sampler, temperature=heat)
    mixture = Mixture(cool, iterates, config.sampling_batch) if iterates else None
    each = config.sampling_batch // config.eval_generations
    held_out = replace(
        source,
        sampler=mixture or cool,
        reward=for_evaluation(source.reward, Path(config.output_dir)),
        group_size=config.eval_generations,
        # a mixture loads its iterates for each chunk, and fills its batches itself
        chunk=max(1, -(-len(prompts) // source.world) if mixture else each),
    )
    by_reward = ByReward(held_out, prompts, mixture.scored if mixture else None)
    return build_evaluator(config, by_reward, judge, cool)
