"""The model, the prompts and what scores completions: whether they are named."""

from __future__ import annotations

from math import isfinite

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def has_inputs(config: RebelConfig) -> Complaints:
    """All that a run needs is named; rollouts bring their prompts and rewards."""
    yield from has_model(config)
    if not config.from_rollouts:
        yield from has_prompts(config)
        yield from has_reward(config)


def has_model(config: RebelConfig) -> Complaints:
    if not config.model_name_or_path and not config.pipeline_name_or_path:
        yield (
            "no model: give --model_name_or_path a Hugging Face name or a folder, or --pipeline_name_or_path one of "
            "diffusers"
        )


def has_prompts(config: RebelConfig) -> Complaints:
    if not config.dataset_name:
        yield "no prompts: give --dataset_name a hub name, a folder or a file"


def has_reward(config: RebelConfig) -> Complaints:
    if not config.reward_funcs and not config.judge and not config.offline:
        yield (
            "no reward: give --reward_funcs a file.py:function, a name of trl.rewards or a reward model; or --judge "
            "what compares two completions; or --offline, if the data have completions with preferences or rewards"
        )


def reward_weights(config: RebelConfig) -> Complaints:
    """A finite weight for each reward."""
    weights, functions = config.reward_weights, config.reward_funcs
    if weights is None:
        return
    judge = " and a --judge" if config.judge else ""
    if functions and len(weights) != len(functions) + bool(config.judge):
        yield (
            f"{said(config, 'reward_weights')}: {len(weights)} for {len(functions)} --reward_funcs{judge}; "
            "give one for each"
        )
    if not all(map(isfinite, weights)):
        yield f"{said(config, 'reward_weights')}: use finite numbers"
