"""A run with everything it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from rebel.algorithm import Objective, trace_weights
from rebel.build.credit import decided
from rebel.build.language import language_model
from rebel.build.learner import build_learner
from rebel.build.length import iterations_of
from rebel.build.model import build_accelerator
from rebel.build.online import PAIRINGS, Parts
from rebel.build.prompts import skipped_in_words
from rebel.build.subject import Data, Subject
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.fit import Regression
from rebel.iterates import FOLDER as ITERATES
from rebel.iterates import Iterates
from rebel.learner import Learner
from rebel.policies.scorer import LanguageModel
from rebel.ppo_clip import ppo_clip
from rebel.record import Recorder
from rebel.report import Terminal
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.trackers import Trackers, training_arguments
from rebel.train import Hooks, Run
from rebel.types import LogProb


def build_run(config: RebelConfig, learner: Learner, reference: LogProb | None, parts: Parts, hooks: Hooks) -> Run:
    """A run over the parts."""
    regression = Regression(
        steps=config.steps_per_iteration,
        passes=config.passes,
        pairing=PAIRINGS[config.pairing],
        step_rule=parts.step_rule,
        beta=config.beta,
        held_out=config.held_out if config.early_stop else 0.0,
        objective=objective_of(config),
        lam=config.credit_lambda,
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


def objective_of(config: RebelConfig) -> Objective:
    """The regression of REBEL, or what it is compared with."""
    return partial(ppo_clip, clip=config.clip_range) if config.algorithm == "ppo_clip" else trace_weights


@dataclass
class Job:
    """A run with what keeps its record: ready to be carried out."""

    config: RebelConfig
    run: Run
    recorder: Recorder
    iterations: int
    plan: list[str]
    parts: Parts
    again: str = ""
    """What goes on with the run, where it is not the command."""


def build_job(
    config: RebelConfig,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[[Notes], Weighted | None],
    data: Data,
    callbacks: Sequence[Any] = (),
) -> Job:
    """All parts of a run of a language model from its settings and what has been loaded. Touches no file.

    Only where everything is scored already and nothing is evaluated by reward can it do without one.
    """
    subject = partial(language_model, model=model, tokenizer=tokenizer, data=data)
    return assembled(config, subject, reward, callbacks)


def assembled(
    config: RebelConfig,
    subject_of: Callable[[RebelConfig, Accelerator], Subject],
    reward: Callable[[Notes], Weighted | None],
    callbacks: Sequence[Any] = (),
) -> Job:
    """All parts of a run of what `subject_of` makes of the settings, on the devices of this run. Touches no file."""
    arguments = training_arguments(config)  # before the accelerator, whose state it would reset
    accelerator = build_accelerator(config)
    notes = Notes()
    judging = reward(notes)
    config = decided(config, judging)
    subject = subject_of(config, accelerator)
    iterations = iterations_of(config, subject.training)
    steps = iterations * config.steps_per_iteration * config.passes
    mover = build_learner(accelerator, subject.policy, config, arguments, steps, subject.budget)
    main, folder = accelerator.is_main_process, Path(config.output_dir)
    trackers = Trackers(callbacks, arguments, subject.model, subject.processing, mover.optimizer, mover.scheduler, main)
    terminal = build_terminal(config, iterations, main)
    notes.trainer_state = trackers.state
    iterates = build_iterates(subject.model, config, iterations)
    recorder = Recorder(
        config,
        folder,
        terminal,
        trackers,
        mover,
        partial(subject.save, mover),
        len(subject.training),
        partial(notes.take_metrics, gather_object),
        iterates=iterates,
    )
    parts = subject.parts(mover, judging, notes, iterates, terminal.say)
    if config.load_best_model_at_end and not parts.evaluator:
        raise RebelError("--load_best_model_at_end has nothing to choose by: give an eval_dataset, or prompts for it")
    recorder.round = parts.per_round
    run = build_run(config, mover, subject.reference, parts, recorder)
    plan = [*subject.plan(parts, iterations, mover.average > 0), *skipped_in_words(config)]
    return Job(config, run, recorder, iterations, plan, parts)


def build_terminal(config: RebelConfig, iterations: int, main: bool) -> Terminal:
    """The table of the run."""
    return Terminal(
        iterations,
        disable=config.disable_tqdm,
        silent=not main,
        judged=bool(config.eval_against),
        offline=config.offline,
        pictures=bool(config.pipeline_name_or_path),
    )


def build_iterates(model: nn.Module, config: RebelConfig, iterations: int) -> Iterates | None:
    """The store of the iterates of a mixture, or None where none is asked for."""
    if not config.mixture:
        return None
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return Iterates(Path(config.output_dir) / ITERATES, trained, config.mixture, iterations)
