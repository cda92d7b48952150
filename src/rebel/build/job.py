"""A run with everything it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft import (
    PeftModel,
)
from transformers import (
    PreTrainedTokenizerBase,
)

from rebel.build.evaluation import judge_of_evaluation
from rebel.build.learner import build_learner
from rebel.build.model import build_accelerator, build_policy, build_reference, reference_is_copy
from rebel.build.offline import Rows, build_groups, describe_offline, offline_parts
from rebel.build.online import PAIRINGS, Parts, online_parts
from rebel.build.prompts import fitting
from rebel.build.rounds import in_rounds, iterations_of_rounds, round_size, whose
from rebel.config import RebelConfig
from rebel.fit import Regression
from rebel.iterates import FOLDER as ITERATES
from rebel.iterates import Iterates
from rebel.learner import Learner
from rebel.model_card import model_card
from rebel.offline.recorded import Groups
from rebel.plan import Memory, describe, estimate, layout_in_words
from rebel.policies.causal_lm import CausalLM, LanguageModel
from rebel.record import Recorder
from rebel.report import Terminal
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.rounds.rollouts import Prompts
from rebel.trackers import Trackers, training_arguments
from rebel.train import Hooks, Run
from rebel.types import Judge, LogProb, Prompt


def build_run(config: RebelConfig, learner: Learner, reference: LogProb | None, parts: Parts, hooks: Hooks) -> Run:
    """A run over the parts."""
    regression = Regression(
        steps=config.steps_per_iteration,
        passes=config.passes,
        pairing=PAIRINGS[config.pairing],
        step_rule=parts.step_rule,
        beta=config.beta,
        held_out=config.held_out if config.early_stop else 0.0,
    )
    return Run(
        learner=learner,
        collector=parts.collector,
        regression=regression,
        reference=reference,
        evaluator=parts.evaluator,
        max_failed=config.max_failed_rewards,
        seed=config.seed,
        hooks=hooks,
    )


def iterations_of(config: RebelConfig, training: Sequence[Prompt] | Groups) -> int:
    """Iterations of the run, from --rounds, --iterations, --num_train_epochs or --max_steps."""
    if in_rounds(config) and not isinstance(training, Groups):
        return iterations_of_rounds(config, round_size(config, training))
    if config.iterations is not None:
        return config.iterations
    if config.num_train_epochs is not None:
        return math.ceil(config.num_train_epochs * len(training) / config.prompts_per_iteration)
    return math.ceil(config.max_steps / (config.steps_per_iteration * config.passes))


@dataclass
class Job:
    """A run with what keeps its record: ready to be carried out."""

    config: RebelConfig
    run: Run
    recorder: Recorder
    iterations: int
    plan: list[str]
    parts: Parts


Data = tuple[Sequence[Prompt], Sequence[Prompt]] | tuple[Rows, Rows | None]
"""What to train and to evaluate on: prompts, or offline rows with completions."""


def build_job(
    config: RebelConfig,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[[Notes], Weighted | None],
    data: Data,
    callbacks: Sequence[Any] = (),
) -> Job:
    """All parts of a run from its settings and what has been loaded. Touches no file.

    Only where everything is scored already and nothing is evaluated by reward can it do without one.
    """
    arguments = training_arguments(config)  # before the accelerator, whose state it would reset
    accelerator = build_accelerator(config)
    policy = build_policy(model.to(accelerator.device), tokenizer, config)
    material = encoded(data, policy, config)
    # offline the anchor is the initial policy, and there are no completions of the policy's own to measure a KL on
    reference = None if config.offline else build_reference(policy, config)
    iterations = iterations_of(config, material.training)
    mover = build_learner(
        accelerator, policy, config, arguments, iterations * config.steps_per_iteration * config.passes
    )
    main, folder = accelerator.is_main_process, Path(config.output_dir)
    trackers = Trackers(callbacks, arguments, policy.model, tokenizer, mover.optimizer, mover.scheduler, main)
    terminal = build_terminal(config, iterations, main)
    notes = Notes(trainer_state=trackers.state)
    iterates = build_iterates(policy, config, iterations)
    recorder = Recorder(
        config,
        folder,
        terminal,
        trackers,
        mover,
        partial(save_model, config, mover),
        len(material.training),
        notes.take_metrics,
        iterates=iterates,
    )
    parts = material.parts(config, mover, reward(notes), notes, iterates, terminal.say, iterations)
    recorder.round = parts.per_round
    run = build_run(config, mover, reference, parts, recorder)
    memory = estimate(policy.model, config, reference_is_copy(reference, policy, config), mover.average > 0)
    plan = material.plan(config, parts, iterations, accelerator.num_processes, memory, policy.shared_prefix)
    return Job(config, run, recorder, iterations, [*plan, *parts.notes, *material.notes], parts)


def build_terminal(config: RebelConfig, iterations: int, main: bool) -> Terminal:
    """The table of the run."""
    return Terminal(
        iterations,
        disable=config.disable_tqdm,
        silent=not main,
        judged=bool(config.eval_against),
        offline=config.offline,
    )


@dataclass(frozen=True, slots=True)
class Material:
    """What a run is trained and evaluated on, prompts or groups, in tokens that fit; `dropped` did not."""

    training: Sequence[Prompt] | Groups
    held_out: Any
    dropped: int = 0
    notes: tuple[str, ...] = ()

    def parts(
        self,
        config: RebelConfig,
        learner: Learner,
        reward: Weighted | None,
        notes: Notes,
        iterates: Iterates | None,
        say: Callable[[str], None],
        iterations: int,
    ) -> Parts:
        """The parts that take their groups from it."""
        if isinstance(self.training, Groups):
            held_out = self.held_out if isinstance(self.held_out, Groups) else None
            return offline_parts(self.training, held_out, learner, config, PAIRINGS[config.pairing], reward, say)
        held = () if isinstance(self.held_out, Groups) else self.held_out
        seen = held if isinstance(self.training, Prompts) else self.training  # by the reward
        if reward and seen:
            reward.check(seen)
        judge: Judge | None = judge_of_evaluation(config, notes, held)
        prompts = (self.training, held)
        return online_parts(config, learner, reward, prompts, judge, iterates, say, iterations, notes.log_metric)

    def plan(
        self, config: RebelConfig, parts: Parts, iterations: int, world: int, memory: Memory, shared: bool
    ) -> list[str]:
        """The plan of the run in words."""
        layout = layout_in_words(config, shared)
        if parts.recordings:
            return describe_offline(config, parts.recordings, self.dropped, iterations, world, memory, layout)
        return describe(config, len(self.training), len(self.held_out), self.dropped, iterations, world, memory, layout)


def encoded(data: Data, policy: CausalLM, config: RebelConfig) -> Material:
    """The prompts, or the groups of the rows, that fit into the lengths."""
    if isinstance(data[0], Rows):
        held_out = build_groups(data[1], policy, config) if isinstance(data[1], Rows) else ()
        return Material(build_groups(data[0], policy, config), held_out, data[0].shared)
    held = fitting(data[1], policy, config)[0] if data[1] else []  # pyright: ignore[reportArgumentType]
    if isinstance(data[0], Prompts):
        return Material(data[0], held, notes=tuple(whose(config, data[0].rollouts, policy)))
    training, dropped = fitting(data[0], policy, config)
    return Material(training, held, dropped)


def build_iterates(policy: CausalLM, config: RebelConfig, iterations: int) -> Iterates | None:
    """The store of the iterates of a mixture, or None where none is asked for."""
    if not config.mixture:
        return None
    trained = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
    return Iterates(Path(config.output_dir) / ITERATES, trained, config.mixture, iterations)


def save_model(config: RebelConfig, learner: Learner, folder: Path) -> None:
    """Write the policy (its average, if one is kept) as Hugging Face loads it, with tokenizer and model card."""
    policy = learner.policy
    assert isinstance(policy, CausalLM), "build_policy made it"
    folder.mkdir(parents=True, exist_ok=True)
    with learner.use_average():
        names: dict[str, Any] = {"selected_adapters": ["default"]} if isinstance(policy.model, PeftModel) else {}
        policy.model.save_pretrained(str(folder), **names)
    policy.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(config, learner))
