"""Who draws, as the settings ask for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM
from rebel.samplers.colocated import colocated
from rebel.samplers.generate import Generate
from rebel.samplers.server import server
from rebel.samplers.vllm import VLLM, Engine, probe_of
from rebel.samplers.weights import check_mergeable
from rebel.types import Prompt

TextSampler = Generate | VLLM

MISMATCH, MISMATCH_16_BITS = 0.01, 0.25
"""Nats by which a token's log-probability differs between vLLM and the trainer at most, unless the settings say so."""

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_sampler(
    config: RebelConfig,
    policy: CausalLM,
    accelerator: Accelerator,
    prompts: Sequence[Prompt],
    note: Callable[[str, float], None] = lambda name, value: None,
) -> TextSampler:
    """Who draws completions of prompts such as these; `note` is told what is measured of it."""
    if config.sampler == "vllm":
        return build_vllm(config, policy, accelerator, prompts, note)
    return build_generate(config, policy, accelerator)


def build_generate(config: RebelConfig, policy: CausalLM, accelerator: Accelerator) -> Generate:
    """The trainer's own model as the sampler."""
    precision: Any = accelerator.autocast  # whose annotation contradicts its default
    return Generate(policy, config.max_completion_length, config.temperature, precision)


def build_vllm(
    config: RebelConfig,
    policy: CausalLM,
    accelerator: Accelerator,
    prompts: Sequence[Prompt],
    note: Callable[[str, float], None],
) -> VLLM:
    """vLLM as the sampler, checked as far as it can be before weights are sent."""
    if accelerator.num_processes > 1:
        raise RebelError(
            f"--sampler vllm on {accelerator.num_processes} processes: this version synchronises it with one; start "
            "one process, or use --sampler generate"
        )
    check_mergeable(policy)
    positions = getattr(policy.bare.causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
    longest = int(min(config.max_prompt_length + config.max_completion_length, positions))
    dtype = next((kind for name, kind in TYPES.items() if getattr(config, name)), policy.model.dtype)
    precision: Any = accelerator.autocast
    return VLLM(
        # a tokenizer must not be used by two threads at once
        policy=replace(policy, tokenizer=copy.deepcopy(policy.tokenizer)) if config.one_step_ahead else policy,
        engine=build_engine(config, policy, longest, dtype),
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        probe=probe_of(policy, prompts[0], longest - 1),
        max_mismatch=config.vllm_max_mismatch or (MISMATCH if dtype == torch.float32 else MISMATCH_16_BITS),
        precision=precision,
        note=note,
    )


def build_engine(config: RebelConfig, policy: CausalLM, longest: int, dtype: torch.dtype) -> Engine:
    """vLLM in this process, or the server that the settings name."""
    if config.vllm_mode == "server":
        folder = Path(config.vllm_weights_dir or config.output_dir)
        address = str(config.vllm_server_base_url).rstrip("/")
        name = config.model_name_or_path or str(policy.bare.causal.config.name_or_path)
        return server(address, name, folder, longest, config.vllm_deadline)
    share, sleeps = config.vllm_gpu_memory_utilization, config.vllm_enable_sleep_mode
    return colocated(policy, longest, dtype, share, sleeps, config.trust_remote_code)


def who_draws(config: RebelConfig) -> tuple[str, ...]:
    """The line of the plan about the sampler, where it is not the trainer's own model."""
    if config.sampler != "vllm":
        return ()
    where = "in this process" if config.vllm_mode == "colocate" else f"at {config.vllm_server_base_url}"
    ahead = ", for the next iteration while this one is trained" if config.one_step_ahead else ""
    return (f"sampler      vLLM {where}{ahead}; weights are sent every iteration, and measured to have arrived",)
