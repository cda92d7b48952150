"""Whether each number lies where it has a meaning, whatever the others are."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said

AT_LEAST = {
    "lora_r": 1,
    "lora_alpha": 1,
    "eval_prompts": 0,
    "data_completions": 0,
    "credit_tokens": 1,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "sampling_batch": 1,
    "prompts_per_iteration": 1,
    "steps_per_iteration": 1,
    "num_iterations": 1,
    "tokens_per_micro_batch": 1,
    "rounds": 1,
    "round_prompts": 1,
    "round_epochs": 1,
    "shard_prompts": 1,
    "iterations": 1,
    "seed": 0,
    "logging_steps": 1,
    "eval_steps": 1,
    "eval_generations": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "judge_concurrency": 1,
    "mixture": 0,
    "denoising_steps": 1,
    "image_size": 8,
    "images_per_micro_batch": 1,
}


def _not_negative(value: float) -> bool:
    return 0 <= value < inf


def _positive(value: float) -> bool:
    return 0 < value < inf


def _below_one(value: float) -> bool:
    return 0 <= value < 1


BETWEEN: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (_not_negative, "0 (no price) or a positive number"),
    "kl_per_iteration": (_positive, "a positive number of nats"),
    "temperature": (_positive, "a positive number; greedy completions would all be the same"),
    "eval_temperature": (_not_negative, "0 (greedy) or a positive number"),
    "missing_eos_penalty": (_not_negative, "a number to subtract, 0 or more"),
    "replace_flat_groups": (_not_negative, "0 (never) or a positive factor"),
    "max_failed_rewards": (lambda share: 0 <= share <= 1, "a share from 0 to 1"),
    "judge_deadline": (_positive, "a positive number of seconds"),
    "vllm_deadline": (_positive, "a positive number of seconds"),
    "vllm_gpu_memory_utilization": (lambda share: 0 < share < 1, "a share between 0 and 1"),
    "vllm_max_mismatch": (_positive, "a positive number of nats"),
    "learning_rate": (_not_negative, "0 or a positive number"),
    "warmup_steps": (_not_negative, "0 or more steps, or a share below 1"),
    "weight_decay": (_not_negative, "0 or more"),
    "adam_beta1": (_below_one, "a number from 0 to below 1"),
    "adam_beta2": (_below_one, "a number from 0 to below 1"),
    "adam_epsilon": (_positive, "a positive number"),
    "max_grad_norm": (_not_negative, "0 (no clipping) or a positive number"),
    "average": (_below_one, "a number from 0 (the last iterate) to below 1"),
    "credit_lambda": (lambda share: 0 <= share <= 1, "a number from 0 to 1"),
    "held_out": (_below_one, "a share from 0 to below 1"),
    "num_train_epochs": (_positive, "a positive number of laps over the data"),
    "constant_margin": (_positive, "a positive number, in the unit of a reward"),
    "margin_clip": (_positive, "a positive number of nats"),
    "guidance_scale": (_not_negative, "0 or a positive number"),
    "noise_level": (_positive, "a positive number: without noise a path has no probability"),
    "noise_floor": (_not_negative, "0 or a positive number"),
    "clip_range": (lambda share: 0 < share < 1, "a number between 0 and 1"),
}


def counts(config: RebelConfig) -> Complaints:
    """Whole numbers are not below the least that means something."""
    if config.num_generations < 2:
        yield f"{said(config, 'num_generations')} leaves nothing to compare; use 2 or more"
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            yield f"{said(config, name)}: use {least} or more"


def ranges(config: RebelConfig) -> Complaints:
    """Other numbers lie where they mean something."""
    for name, (holds, allowed) in BETWEEN.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            yield f"{said(config, name)}: use {allowed}"
