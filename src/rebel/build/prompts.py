"""Prompts as the settings name them, and those of them that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from rebel.config import RebelConfig
from rebel.data import empty_lines, load_prompts, that_fit
from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM
from rebel.types import Prompt


def build_prompts(config: RebelConfig) -> tuple[list[Prompt], list[Prompt]]:
    """(training, evaluation) prompts as the settings name them."""
    load = partial(load_prompts, str(config.dataset_name), column=config.prompt_column, config=config.dataset_config)
    prompts = load(split=config.dataset_train_split)
    if not config.eval_prompts:
        return prompts, []
    if config.dataset_test_split:
        return prompts, load(split=config.dataset_test_split)[: config.eval_prompts]
    if len(prompts) <= config.eval_prompts:
        raise RebelError(
            f"--eval_prompts {config.eval_prompts} leaves none of the {len(prompts)} prompts for training; "
            "lower it, or name a --dataset_test_split"
        )
    return prompts[config.eval_prompts :], prompts[: config.eval_prompts]


def skipped_in_words(config: RebelConfig) -> list[str]:
    """A line for the plan where the file of prompts has empty lines."""
    count = empty_lines(str(config.dataset_name)) if config.dataset_name else 0
    lines = f"{count:,} empty line{'' if count == 1 else 's'}"
    return [f"skipped      {lines} of {config.dataset_name}"] if count else []


def fitting(prompts: Sequence[Prompt], policy: CausalLM, config: RebelConfig) -> tuple[list[Prompt], int]:
    """The prompts that leave room for a completion, and the number of those that do not."""
    check_template(prompts, policy)
    positions = getattr(policy.bare.causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = min(config.max_prompt_length, positions - config.max_completion_length)
    if room < 1:
        raise RebelError(
            f"--max_completion_length {config.max_completion_length} leaves no room for a prompt: the model has "
            f"{positions} positions"
        )
    longest = int(room) + config.max_completion_length
    if longest > config.tokens_per_micro_batch:
        raise RebelError(
            f"--tokens_per_micro_batch {config.tokens_per_micro_batch} is less than one completion may need "
            f"({longest} = prompt and completion); raise it, or lower --max_prompt_length"
        )
    return that_fit(prompts, policy.encode, int(room))


def check_template(prompts: Sequence[Prompt], policy: CausalLM) -> None:
    if policy.tokenizer.chat_template is None and any(not isinstance(p.content, str) for p in prompts):
        raise RebelError(
            "the prompts are chat messages, but the tokenizer has no chat template: use a chat model, add a "
            "chat_template.jinja to its folder, or give prompts of plain text"
        )
