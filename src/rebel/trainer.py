"""RebelTrainer: the names a user of TRL knows, over the same parts as the command line."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import TrainOutput

from rebel.build.job import build_job
from rebel.build.model import build_model, build_tokenizer, with_adapter
from rebel.build.offline import RowsIn, first_rows, rows_of
from rebel.build.prompts import fitting
from rebel.build.rewards import reward_if_any
from rebel.build.rounds import stored
from rebel.build.subject import Data
from rebel.checkpoint import Progress
from rebel.config import RebelConfig
from rebel.data import prompts_of
from rebel.errors import RebelError
from rebel.evaluators import ByReward
from rebel.from_trl import translate_batch
from rebel.job import carry_out, check_hub, push
from rebel.policies.causal_lm import CausalLM
from rebel.policies.scorer import LanguageModel
from rebel.rounds.rollouts import Prompts
from rebel.run_folder import checkpoint_to_resume, claim_folder
from rebel.settings import resolve
from rebel.trackers import named
from rebel.train import Evaluator, evaluated
from rebel.types import Prompt
from rebel.validate import validate

RewardFunc = str | Callable[..., Any] | PreTrainedModel
Callback = TrainerCallback | type[TrainerCallback]


class RebelTrainer:
    """Tunes a causal language model with REBEL; takes the place of TRL's GRPOTrainer.

    Datasets have a column `prompt`, text or chat messages; their other columns reach the reward functions by name.
    A reward function returns a number for each completion, or None where it does not apply.

    With `offline=True` in the settings, or without any reward or judge, it takes the place of DPOTrainer: datasets
    have `chosen` and `rejected`, or `completions` with rewards or comparisons, and nothing is drawn.
    """

    def __init__(
        self,
        model: str | LanguageModel,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: RebelConfig | None = None,
        train_dataset: Dataset | Sequence[dict[str, Any]] | None = None,
        eval_dataset: Dataset | Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Callback | Sequence[Callback] | None = None,
    ) -> None:
        check_arguments(model, args, peft_config)
        rewards = reward_list(reward_funcs)
        args = args or RebelConfig()
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        recorded = not (rewards or args.judge or args.from_rollouts)
        self.args = settings(replace(args, offline=args.offline or recorded), model, peft_config)
        if processing_class is None and self.args.model_name_or_path is None:
            raise RebelError("the model does not say where its tokenizer is: give it as processing_class")
        self.processing_class = processing_class or build_tokenizer(self.args)
        self.job = build_job(
            self.args,
            loaded_model(model, self.args, peft_config),
            self.processing_class,
            partial(reward_if_any, self.args, rewards=rewards),
            data_of(train_dataset, eval_dataset, self.args, by_reward=bool(rewards)),
            list_of(callbacks),
        )
        self.job.again = "trainer.train(resume_from_checkpoint=True)"

    @property
    def model(self) -> LanguageModel:
        """The policy's model, with its adapter if it has one."""
        policy = self.job.run.learner.policy
        assert isinstance(policy, CausalLM), "build_job made it"
        return policy.model

    @property
    def state(self) -> Any:
        """transformers' TrainerState: `log_history`, `global_step` and the rest."""
        return self.job.recorder.trackers.state

    @property
    def accelerator(self) -> Accelerator:
        """That of this process."""
        return self.job.run.learner.accelerator

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser of the weights that are trained."""
        return self.job.run.learner.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule of the learning rate."""
        return self.job.run.learner.scheduler

    @property
    def callback_handler(self) -> CallbackHandler:
        """transformers' handler of the callbacks and trackers."""
        return self.job.recorder.trackers.handler

    def is_world_process_zero(self) -> bool:
        """Whether this is the process that writes files."""
        return self.job.recorder.main

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run to the end. Settings, metrics, report and model are in `output_dir`.

        Returns the optimiser steps, the mean loss (the paper's, in squared units of the reward; NaN where nothing was
        regressed), and the seconds, iterations and samples of the run.
        """
        began = time.monotonic()
        if resume_from_checkpoint is not None:
            self.args = replace(self.args, resume_from_checkpoint=resume_from_checkpoint)
        resume = checkpoint_to_resume(self.args)
        check_hub(self.args)
        claim_folder(self.args, resume is not None)
        for line in self.job.plan:
            self.job.recorder.terminal.say(line)
        progress = carry_out(self.job, resume)
        if self.args.push_to_hub:
            self.push_to_hub()
        return output(self.state.log_history, progress, time.monotonic() - began)

    def evaluate(self, eval_dataset: Dataset | Sequence[dict[str, Any]] | None = None) -> dict[str, float]:
        """Reward on the evaluation prompts with its standard error, KL and lengths; offline accuracy on pairs, R^2.

        On other prompts where an `eval_dataset` is given. Callbacks and trackers hear of it.
        """
        run = self.job.run
        evaluator = run.evaluator if eval_dataset is None else self.evaluator_on(eval_dataset)
        if evaluator is None:
            raise RebelError("there is nothing to evaluate on: give an eval_dataset")
        metrics = named(evaluated(run, evaluator).metrics)
        self.job.recorder.trackers.log(metrics)
        self.job.recorder.trackers.evaluated(metrics)
        return metrics

    def evaluator_on(self, dataset: Dataset | Sequence[dict[str, Any]]) -> Evaluator:
        """Evaluation by reward, as before, on all prompts of another data set."""
        run = self.job.run
        if not isinstance(run.evaluator, ByReward):
            raise RebelError(
                "evaluate(eval_dataset) is for evaluations by reward of a trainer that has an eval_dataset; give the "
                "data set to RebelTrainer instead"
            )
        policy = run.learner.policy
        assert isinstance(policy, CausalLM), "build_job made it"
        given = prompts(dataset, self.args, "eval_dataset")
        return replace(run.evaluator, prompts=fitting(given, policy, self.args)[0])

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the policy as Hugging Face loads it, with its tokenizer and a model card."""
        if self.job.recorder.main:
            self.job.recorder.save_model(Path(output_dir or self.args.output_dir))

    def push_to_hub(self) -> str:
        """Upload what is in `output_dir`; returns the address."""
        return push(self.job)

    def add_callback(self, callback: Callback) -> None:
        """One more callback of transformers."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: Callback) -> None:
        """One callback fewer."""
        self.callback_handler.remove_callback(callback)


def check_arguments(model: Any, args: Any, peft_config: Any) -> None:
    """One clear error for what cannot be what it should be."""
    if args is not None and not isinstance(args, RebelConfig):
        raise RebelError(
            f"args is a {type(args).__name__}; use RebelConfig, which has TRL's names where the meaning is the same"
        )
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise RebelError(f"model is a {type(model).__name__}; give a name, a folder, or a causal language model")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise RebelError(f"peft_config is a {type(peft_config).__name__}; give a configuration of peft, as LoraConfig")
    if peft_config is not None and hasattr(model, "peft_config"):
        raise RebelError("the model has an adapter, and peft_config is for a new one; leave peft_config out")


def output(history: Sequence[Mapping[str, Any]], progress: Progress, seconds: float) -> TrainOutput:
    """What transformers' Trainer returns of a run."""
    losses = [row["loss"] for row in history if "loss" in row]
    loss = fmean(losses) if losses else math.nan
    metrics = {
        "train_runtime": round(seconds, 4),
        "train_steps_per_second": round(progress.step / seconds, 3),
        "train_loss": loss,
        "train_iterations": float(progress.iteration),
        "train_samples": float(progress.samples),
    }
    return TrainOutput(progress.step, loss, metrics)


def settings(args: RebelConfig, model: str | LanguageModel, peft_config: PeftConfig | None) -> RebelConfig:
    """The settings with what the objects say, checked, and TRL's batch arguments translated."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or None
    adapter = args.use_peft or peft_config is not None or hasattr(model, "peft_config")
    args = resolve(vars(replace(args, model_name_or_path=name, use_peft=adapter)))
    args, lines = translate_batch(args, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    for line in lines:
        print(line)
    return validate(args, inputs=False)


def loaded_model(model: str | LanguageModel, args: RebelConfig, peft_config: PeftConfig | None) -> LanguageModel:
    """The model itself, with its adapter."""
    if isinstance(model, str):
        built = build_model(replace(args, use_peft=args.use_peft and peft_config is None))
        if peft_config is None:
            return built
        if isinstance(built, PeftModel):
            raise RebelError("peft_config is a new adapter and adapter_path a trained one; give only one of them")
        return with_adapter(built, args, peft_config)
    if isinstance(model, PeftModel) or hasattr(model, "peft_config") or not args.use_peft:
        return model
    return with_adapter(model, args, peft_config)


def reward_list(given: Any) -> list[RewardFunc]:
    """The rewards, given alone or as several."""
    rewards: list[Any] = list_of(given)
    for reward in rewards:
        if not (isinstance(reward, str | PreTrainedModel) or callable(reward)):
            raise RebelError(f"reward_funcs has a {type(reward).__name__}; give functions, names, or reward models")
    return rewards


def list_of(given: Any) -> list[Any]:
    """What may be given alone or as several."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def data_of(training: RowsIn | None, evaluation: RowsIn | None, args: RebelConfig, by_reward: bool) -> Data:
    """What to train and to evaluate on: prompts, rollouts drawn before, or offline rows with completions."""
    if args.from_rollouts:
        return Prompts(stored(args.from_rollouts)), held_out(evaluation, args)
    if not args.offline:
        return prompts(training, args, "train_dataset"), held_out(evaluation, args)
    if training is None:
        raise RebelError("train_dataset is missing: rows with chosen and rejected, or with completions")
    mine = rows_of(training, args, by_reward, "train_dataset")
    if evaluation is None or not args.eval_prompts:
        return mine, None
    return mine, first_rows(rows_of(evaluation, args, by_reward, "eval_dataset"), args.eval_prompts)


def prompts(dataset: Any, args: RebelConfig, name: str) -> list[Prompt]:
    """Those of a data set or of rows."""
    if dataset is None:
        raise RebelError(f"{name} is missing: rows with a column {args.prompt_column!r}")
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(str, dataset))
        raise RebelError(f"{name} has several parts ({splits}); give one of them: {name}=data[{next(iter(dataset))!r}]")
    if not hasattr(dataset, "__len__"):
        raise RebelError(f"{name} is a {type(dataset).__name__}, which has no length; give a Dataset or a list of rows")
    return prompts_of(dataset, args.prompt_column, name)


def held_out(dataset: Dataset | Sequence[dict[str, Any]] | None, args: RebelConfig) -> list[Prompt]:
    """The first `eval_prompts` rows of the evaluation set; nothing is taken from the training set in its place."""
    return [] if dataset is None else prompts(dataset, args, "eval_dataset")[: args.eval_prompts]
