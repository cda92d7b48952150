"""What a run is going to do, in words and numbers, before it does it; with an estimate of its memory."""

from __future__ import annotations

from dataclasses import dataclass

from rebel.config import RebelConfig
from rebel.policies.footprint import kept_of_token
from rebel.policies.scorer import LanguageModel, most_logits
from rebel.stepsize import REACH

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one process needs at most, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    reference: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__slots__)


def estimate(model: LanguageModel, config: RebelConfig, reference_is_copy: bool, averages: bool) -> Memory:
    """Memory of the update with an AdamW-like optimiser. Sampling needs less: no gradients, one cache."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    shape = model.config.get_text_config()
    width, layers = shape.hidden_size, shape.num_hidden_layers
    kept = 2 * width if config.gradient_checkpointing else kept_of_token(shape)
    size = 2 if config.bf16 or config.fp16 else max(p.element_size() for p in model.parameters())
    chunk = min(most_logits(model.device), config.tokens_per_micro_batch * shape.vocab_size)
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=2 * trained,
        average=trained if averages else 0,
        reference=weights if reference_is_copy else 0,
        activations=config.tokens_per_micro_batch * layers * kept * size,
        logits=3 * 4 * chunk,
    )


def describe(
    config: RebelConfig,
    prompts: int,
    evaluated: int,
    dropped: int,
    iterations: int,
    world: int,
    memory: Memory,
    layout: str,
) -> list[str]:
    """The plan of a run, a line for each thing a user may want to check."""
    group, steps = config.num_generations, config.steps_per_iteration * config.passes
    drawn = config.prompts_per_iteration * group
    passes = f" in {config.passes} passes" if config.passes > 1 else ""
    per_step = config.prompts_per_iteration / config.steps_per_iteration
    lost = f"; {dropped:,} longer than fits were dropped" if dropped else ""
    samples = f"{iterations * drawn:,} samples, "
    if config.rounds is not None or config.from_rollouts:
        samples = ""
    return [
        f"prompts      {prompts:,} to train on, {evaluated:,} to evaluate on{lost}",
        f"iteration    {config.prompts_per_iteration} prompts x {group} completions = {drawn:,} samples of at most "
        f"{config.max_completion_length} tokens",
        f"regression   {counted(steps, 'optimiser step')}{passes}, about {counted(per_step, 'prompt')} "
        f"({per_step * group:g} completions) each, {config.pairing} pairs",
        f"step         {step_in_words(config)}",
        f"run          {length_in_words(iterations, steps)}, "
        f"{samples}{iterations * config.prompts_per_iteration / max(prompts, 1):.2f} passes over the prompts",
        *last_lines(config, world, memory, layout),
    ]


def describe_images(config: RebelConfig, prompts: int, evaluated: int, iterations: int, world: int) -> list[str]:
    """The plan of a run that draws images."""
    group, steps = config.num_generations, config.steps_per_iteration * config.passes
    drawn = config.prompts_per_iteration * group
    passes = f" in {config.passes} passes" if config.passes > 1 else ""
    per_step = config.prompts_per_iteration / config.steps_per_iteration
    regression = (
        f"{config.pairing} pairs, credit to each {config.credit}"
        if config.algorithm == "rebel"
        else f"PPO's objective on each step, clipped at {config.clip_range:g}"
    )
    return [
        f"prompts      {prompts:,} to train on, {evaluated:,} to evaluate on",
        f"iteration    {config.prompts_per_iteration} prompts x {group} images = {drawn:,} samples of "
        f"{config.denoising_steps} denoising steps",
        f"{config.algorithm.ljust(12)} {counted(steps, 'optimiser step')}{passes}, about {counted(per_step, 'prompt')} "
        f"({per_step * group:g} images) each, {regression}",
        *([f"step         {step_in_words(config)}"] if config.algorithm == "rebel" else []),
        f"run          {length_in_words(iterations, steps)}, "
        f"{iterations * drawn:,} samples, "
        f"{iterations * config.prompts_per_iteration / max(prompts, 1):.2f} passes over the prompts",
        f"processes    {world}, {config.images_per_micro_batch} images at once (no effect on the result)",
    ]


def length_in_words(iterations: int, steps: int) -> str:
    """How long a run is, of so many optimiser steps an iteration."""
    return f"{counted(iterations, 'iteration')} = {counted(iterations * steps, 'optimiser step')}"


def counted(count: int | float, noun: str) -> str:
    """So many of them, in words."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'s' * (count != 1)}"


def last_lines(config: RebelConfig, world: int, memory: Memory, layout: str) -> list[str]:
    """What a run needs."""
    return [
        f"processes    {world}, micro-batches of at most {config.tokens_per_micro_batch:,} tokens "
        f"(no effect on the result), {layout}",
        f"memory       about {memory.total / GIB:.2f} GiB a process: " + breakdown(memory),
    ]


def layout_in_words(config: RebelConfig, shared: bool) -> str:
    """How often a prompt is computed, and why not once."""
    if shared:
        return "a prompt once for its completions"
    if not config.shared_prefix:
        return "a prompt anew for each completion (--shared_prefix false)"
    return "a prompt anew for each completion (this model cannot share it)"


def step_in_words(config: RebelConfig) -> str:
    """How far an iteration goes, and what holds it near the initial policy."""
    price = (
        f"beta {config.beta:g} reward per nat ({config.kl})"
        if config.beta
        else "no price on the KL to the initial policy"
    )
    if config.eta == "auto":
        goal = config.kl_per_iteration
        held = f"{goal:g} nats per completion and iteration" if goal else "free KL"
        return f"eta auto ({REACH:g} nats per standard deviation of the reward, {held}); {price}"
    return f"eta {config.eta:g} nats per unit of reward; {price}"


def breakdown(memory: Memory) -> str:
    parts = [(name, getattr(memory, name)) for name in memory.__slots__]
    return ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts if value)
