"""RebelTrainer: the names a user of TRL knows, over the same parts as the command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rebel.build.job import build_job
from rebel.build.model import build_model, build_tokenizer, with_adapter
from rebel.build.offline import RowsIn, first_rows, rows_of
from rebel.build.rewards import reward_if_any
from rebel.build.rounds import stored
from rebel.build.subject import Data
from rebel.checkpoint import Progress
from rebel.config import RebelConfig
from rebel.data import prompts_of
from rebel.errors import RebelError
from rebel.from_trl import translate_batch
from rebel.job import carry_out, push
from rebel.policies.causal_lm import CausalLM
from rebel.policies.scorer import LanguageModel
from rebel.rounds.rollouts import Prompts
from rebel.run_folder import checkpoint_to_resume, claim_folder
from rebel.settings import resolve
from rebel.train import evaluated
from rebel.types import Prompt
from rebel.validate import validate

RewardFunc = str | Callable[..., Any] | PreTrainedModel


class RebelTrainer:
    """Tunes a causal language model with REBEL; takes the place of TRL's GRPOTrainer.

    Datasets have a column `prompt`, text or chat messages; their other columns reach the reward functions by name.
    A reward function returns a number for each completion, or None where it does not apply.

    With `offline=True` in the settings, or without any reward or judge, it takes the place of DPOTrainer: datasets
    have `chosen` and `rejected`, or `completions` with rewards or comparisons, and nothing is drawn.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: RebelConfig | None = None,
        train_dataset: Dataset | Sequence[dict[str, Any]] | None = None,
        eval_dataset: Dataset | Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
    ) -> None:
        rewards = reward_list(reward_funcs)
        args = args or RebelConfig()
        recorded = not (rewards or args.judge or args.from_rollouts)
        self.args = settings(replace(args, offline=args.offline or recorded), model, peft_config)
        self.processing_class = processing_class or build_tokenizer(self.args)
        self.job = build_job(
            self.args,
            loaded_model(model, self.args, peft_config),
            self.processing_class,
            partial(reward_if_any, self.args, rewards=rewards),
            data_of(train_dataset, eval_dataset, self.args, by_reward=bool(rewards)),
            callbacks,
        )

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

    def train(self, resume_from_checkpoint: str | bool | None = None) -> Progress:
        """Run to the end; returns where the run stands. Settings, metrics, report and model are in `output_dir`."""
        if resume_from_checkpoint is not None:
            self.args = replace(self.args, resume_from_checkpoint=resume_from_checkpoint)
        resume = checkpoint_to_resume(self.args)
        claim_folder(self.args, resume is not None)
        for line in self.job.plan:
            self.job.recorder.terminal.say(line)
        progress = carry_out(self.job, resume)
        if self.args.push_to_hub:
            self.push_to_hub()
        return progress

    def evaluate(self) -> dict[str, float]:
        """Reward on the evaluation prompts with its standard error, KL and lengths; offline accuracy on pairs, R^2."""
        run = self.job.run
        if run.evaluator is None:
            raise RebelError("there is nothing to evaluate on: give an eval_dataset")
        return evaluated(run, run.evaluator).metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the policy as Hugging Face loads it, with its tokenizer and a model card."""
        if self.job.recorder.main:
            self.job.recorder.save_model(Path(output_dir or self.args.output_dir))

    def push_to_hub(self) -> str:
        """Upload what is in `output_dir`; returns the address."""
        return push(self.job)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """One more callback of transformers."""
        self.job.recorder.trackers.handler.add_callback(callback)


def settings(args: RebelConfig, model: str | PreTrainedModel, peft_config: PeftConfig | None) -> RebelConfig:
    """The settings with what the objects say, checked, and TRL's batch arguments translated."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or None
    adapter = args.use_peft or peft_config is not None or hasattr(model, "peft_config")
    args = resolve(vars(replace(args, model_name_or_path=name, use_peft=adapter)))
    args, lines = translate_batch(args, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    for line in lines:
        print(line)
    return validate(args, inputs=False)


def loaded_model(model: str | PreTrainedModel, args: RebelConfig, peft_config: PeftConfig | None) -> LanguageModel:
    """The model itself, with its adapter."""
    if isinstance(model, str):
        built = build_model(replace(args, use_peft=args.use_peft and peft_config is None))
        if peft_config is None:
            return built
        if isinstance(built, PeftModel):
            raise RebelError("peft_config is a new adapter and adapter_path a trained one; give only one of them")
        return with_adapter(built, args, peft_config)
    return with_adapter(model, args, peft_config) if args.use_peft and not hasattr(model, "peft_config") else model


def reward_list(given: RewardFunc | Sequence[RewardFunc] | None) -> list[RewardFunc]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]  # pyright: ignore[reportReturnType]


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


def prompts(dataset: Dataset | Sequence[dict[str, Any]] | None, args: RebelConfig, name: str) -> list[Prompt]:
    if dataset is None:
        raise RebelError(f"{name} is missing: rows with a column {args.prompt_column!r}")
    return prompts_of(dataset, args.prompt_column, name)


def held_out(dataset: Dataset | Sequence[dict[str, Any]] | None, args: RebelConfig) -> list[Prompt]:
    """The first `eval_prompts` rows of the evaluation set; nothing is taken from the training set in its place."""
    return [] if dataset is None else prompts(dataset, args, "eval_dataset")[: args.eval_prompts]
