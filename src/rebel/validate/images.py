"""Pipelines of images, and what has a meaning for them or for language models alone."""

from __future__ import annotations

from rebel.config import RebelConfig
from rebel.settings import known
from rebel.validate.said import Complaints, said

OF_IMAGES = (
    *("denoising_steps", "guidance_scale", "noise_level", "noise_floor", "image_size", "same_noise"),
    *("algorithm", "clip_range", "images_per_micro_batch", "judge_funcs"),
)
"""Settings that mean something for a pipeline alone."""

OF_TEXT = (
    *("attn_implementation", "activation_offloading", "load_in_4bit", "offline", "data_completions", "data_columns"),
    *("judge", "eval_against"),
    *("missing_eos_penalty", "drop_truncated", "temperature", "max_completion_length", "eval_temperature", "mixture"),
    *("chat_template_kwargs", "rounds", "from_rollouts", "tokens_per_micro_batch", "max_prompt_length"),
    *("sampler", "one_step_ahead", "credit_tokens", "credit_lambda"),
)
"""Settings that mean something for a language model alone."""


def one_kind(config: RebelConfig) -> Complaints:
    """Language models and pipelines: what has no meaning for the one that is tuned."""
    if config.model_name_or_path and config.pipeline_name_or_path:
        yield "--model_name_or_path is a language model and --pipeline_name_or_path draws images; give one of them"
        return
    kind, foreign = ("images", OF_TEXT) if config.pipeline_name_or_path else ("text", OF_IMAGES)
    for name in foreign:
        if getattr(config, name) != known()[name].default:
            needed = "language models" if kind == "images" else "pipelines (--pipeline_name_or_path)"
            yield f"{said(config, name)} is for {needed} and has no meaning for {kind}; leave it out"
    if config.pipeline_name_or_path:
        yield from _images(config)


def _images(config: RebelConfig) -> Complaints:
    both = [name for name in config.judge_funcs if name in config.reward_funcs]
    if both:
        yield (
            f"--judge_funcs {both[0]} is also among --reward_funcs: a judge shows what the reward does not, and only "
            "where it is never trained on; take it out of one of them"
        )
    if config.algorithm == "ppo_clip":
        if config.pairing != "all":
            yield f"{said(config, 'algorithm', 'pairing')}: PPO compares with the mean of all; use --pairing all"
        if config.kl_per_iteration is not None or config.early_stop:
            name = "early_stop" if config.early_stop else "kl_per_iteration"
            yield f"{said(config, 'algorithm', name)}: that belongs to the regression of rebel; leave it out"
