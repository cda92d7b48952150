"""What is wrong with the settings of a run, as far as it can be told without loading anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import inf, isfinite
from pathlib import Path

from rebel.config import RebelConfig
from rebel.convert import shown
from rebel.errors import RebelError
from rebel.settings import known, resolve

Complaints = Iterator[str]

AT_LEAST = {
    "lora_r": 1,
    "lora_alpha": 1,
    "eval_prompts": 0,
    "data_completions": 0,
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

OF_IMAGES = (
    *("denoising_steps", "guidance_scale", "noise_level", "noise_floor", "image_size", "same_noise"),
    *("algorithm", "clip_range", "images_per_micro_batch", "judge_funcs"),
)
"""Settings that mean something for a pipeline alone."""

OF_TEXT = (
    *(
        "attn_implementation",
        "activation_offloading",
        "load_in_4bit",
        "offline",
        "data_completions",
        "data_columns",
        "judge",
        "eval_against",
    ),
    *("missing_eos_penalty", "drop_truncated", "temperature", "max_completion_length", "eval_temperature", "mixture"),
    *("chat_template_kwargs", "rounds", "from_rollouts", "tokens_per_micro_batch", "max_prompt_length"),
    *("sampler", "one_step_ahead", "credit_tokens", "credit_lambda"),
)
"""Settings that mean something for a language model alone."""

TRUNCATIONS = {"top_p": (1.0,), "top_k": (None, 0), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def validate(config: RebelConfig, *, inputs: bool = True) -> RebelConfig:
    """The settings with every value in its type, or one error with all that is wrong.

    TRL's batch arguments are translated before. `inputs=False` where the model, the prompts and the rewards
    are given as objects, as in RebelTrainer.
    """
    return _checked(config, INPUTS + CHECKS if inputs else CHECKS)


def validate_drawing(config: RebelConfig, *, prompts: bool = True) -> RebelConfig:
    """The settings of `rebel rollout`, checked: those of a run, of which it needs no reward and no length."""
    drawing = (_model, _prompts) if prompts else (_model,)
    return _checked(config, (*drawing, _home, _counts, _ranges, _sampling, _precision, _adapter, _vllm))


def validate_scoring(config: RebelConfig) -> RebelConfig:
    """The settings of `rebel score`, checked."""
    return _checked(config, (_reward, _rewards))


def _checked(config: RebelConfig, checks: tuple[Callable[[RebelConfig], Complaints], ...]) -> RebelConfig:
    config = resolve(vars(config))
    complaints = [complaint for check in checks for complaint in check(config)]
    if complaints:
        raise RebelError("\n".join(complaints))
    return config


def _said(config: RebelConfig, *names: str) -> str:
    first, *others = (f"--{name} {shown(getattr(config, name))}" for name in names)
    return first + (" with " + " and ".join(others) if others else "")


def _counts(config: RebelConfig) -> Complaints:
    if config.num_generations < 2:
        yield f"{_said(config, 'num_generations')} leaves nothing to compare; use 2 or more"
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            yield f"{_said(config, name)}: use {least} or more"


def _ranges(config: RebelConfig) -> Complaints:
    for name, (holds, allowed) in BETWEEN.items():
        value = getattr(config, name)
        if value is not None and not holds(value):
            yield f"{_said(config, name)}: use {allowed}"


def _eta(config: RebelConfig) -> Complaints:
    eta, beta = config.eta, config.beta
    if eta == "auto":
        if config.kl == "shaped":
            yield "--kl shaped keeps the step at --eta, and --eta auto chooses it: give --eta as a number"
        return
    if config.kl_per_iteration is not None:
        yield f"{_said(config, 'kl_per_iteration', 'eta')}: a stated KL chooses the step itself; use --eta auto"
    elif not eta > 0:
        yield f"{_said(config, 'eta')}: use a positive number of nats per unit of reward, or auto"
    elif eta == inf and not beta > 0:
        yield "--eta inf needs a --beta above 0, which then sets the step: 1 / beta"
    elif config.kl == "shaped" and eta * beta >= 2:
        yield (
            f"{_said(config, 'kl', 'eta', 'beta')} does not converge: eta * beta must stay below 2. "
            "Use --kl proximal, which is stable for every eta, or lower one of them"
        )


def _sampling(config: RebelConfig) -> Complaints:
    for name, neutral in TRUNCATIONS.items():
        if getattr(config, name) not in neutral:
            yield (
                f"{_said(config, name)} is refused in training: completions would come from another "
                "distribution than the one whose log-probabilities are regressed. Leave it out; "
                "--temperature is accounted for"
            )
    if config.missing_eos_penalty and config.drop_truncated:
        yield (
            f"{_said(config, 'missing_eos_penalty')} has no effect with --drop_truncated, which leaves the "
            "completions it is for out; use one of them"
        )


def _batch(config: RebelConfig) -> Complaints:
    prompts, steps = config.prompts_per_iteration, config.steps_per_iteration
    if 0 < prompts < steps:
        yield (
            f"{_said(config, 'steps_per_iteration', 'prompts_per_iteration')}: each step takes the "
            f"completions of one prompt or more. Use at most {prompts} steps, or more passes with --num_iterations"
        )
    elif config.early_stop and not config.held_out:
        yield "--early_stop watches completions that are not trained on; give --held_out a share above 0"
    elif config.early_stop and steps > prompts * (1 - config.held_out):
        yield (
            f"{_said(config, 'steps_per_iteration', 'prompts_per_iteration', 'held_out')}: fewer prompts "
            "than steps are left to train on. Use fewer steps, more prompts, or hold out less"
        )


def _precision(config: RebelConfig) -> Complaints:
    if config.dtype not in DTYPES:
        yield f"{_said(config, 'dtype')}: {', '.join(DTYPES[:-1])} or {DTYPES[-1]} is expected"
    if config.bf16 and config.fp16:
        yield "--bf16 and --fp16 exclude each other; use one of them"
    if config.fp16 and config.use_cpu:
        yield "--fp16 needs a CUDA device, and --use_cpu stays on the CPU; use --bf16, or neither"


def _data(config: RebelConfig) -> Complaints:
    """Offline and hybrid: what has no meaning for completions that somebody else drew."""
    share, columns = config.data_completions, config.data_columns
    if config.offline:
        if share or columns:
            yield "--offline draws no completions to put those of --data_columns beside; use one of them"
        if config.kl_per_iteration is not None:
            yield (
                f"{_said(config, 'kl_per_iteration', 'offline')}: a KL is measured on the policy's own completions, "
                "and none are drawn; use --eta"
            )
        if config.track_kl:
            yield "--track_kl with --offline: a KL is measured on the policy's own completions, and none are drawn"
        if config.kl == "shaped" and config.beta:
            yield f"{_said(config, 'kl', 'offline')}: at the initial policy no KL is paid yet; use --kl proximal"
        if config.replace_flat_groups:
            yield f"{_said(config, 'replace_flat_groups', 'offline')}: nothing is drawn; take such groups out yourself"
    elif bool(share) != bool(columns):
        yield ("--data_completions says how many of a group come from the data and --data_columns which; give both")
    elif share >= config.num_generations:
        yield (
            f"{_said(config, 'data_completions', 'num_generations')} leaves nothing for the policy to draw; use fewer, "
            "or --offline"
        )


def _length(config: RebelConfig) -> Complaints:
    if config.rounds is not None or config.from_rollouts:
        yield from _large_batch(config)
    elif config.max_steps != -1 and config.max_steps < 1:
        yield f"{_said(config, 'max_steps')}: use 1 or more optimiser steps (-1: not given)"
    else:
        yield from _duration(config)


def _duration(config: RebelConfig) -> Complaints:
    given = [
        name for name in ("iterations", "max_steps", "num_train_epochs") if getattr(config, name) not in (None, -1)
    ]
    if not given:
        yield (
            "how long to train is not given: use --iterations, or --max_steps for optimiser steps, or "
            "--num_train_epochs for laps over the data, or --rounds for large batches"
        )
    elif len(given) > 1:
        yield f"{_said(config, *given)}: {'both' if len(given) == 2 else 'all'} say how long to train; use one of them"


def _large_batch(config: RebelConfig) -> Complaints:
    way = "from_rollouts" if config.rounds is None else "rounds"
    if (config.rounds or 1) > 1 and config.from_rollouts:
        yield f"{_said(config, 'rounds', 'from_rollouts')}: rollouts drawn before are one round; use --rounds 1"
    for name, neutral in (("iterations", None), ("max_steps", -1), ("num_train_epochs", None)):
        if getattr(config, name) != neutral:
            yield f"{_said(config, name, way)}: rollouts and --round_epochs say how long to train; leave --{name} out"
    if config.replace_flat_groups:
        yield (
            f"{_said(config, 'replace_flat_groups', way)}: all prompts are drawn from before any is regressed, so "
            "there are no others to draw in their place; leave it out"
        )
    if config.kl_per_iteration is not None:
        yield (
            f"{_said(config, 'kl_per_iteration', way)}: it holds the KL of iterations that begin at their own pi_t, "
            "and these are parts of one round; leave it out, or use --iterations"
        )


def _no_large_batch(config: RebelConfig) -> Complaints:
    if config.rounds is None and not config.from_rollouts:
        for name, neutral in (("round_prompts", None), ("round_epochs", 1)):
            if getattr(config, name) != neutral:
                yield f"{_said(config, name)} is for large batches; give --rounds with it"


def _home(config: RebelConfig) -> Complaints:
    if not config.from_rollouts:
        yield "where to is not given: use --to for the folder of the rollouts"


def _evaluation(config: RebelConfig) -> Complaints:
    if config.load_best_model_at_end and (config.eval_strategy == "no" or config.eval_prompts == 0):
        yield (
            f"--load_best_model_at_end has nothing to choose: {_said(config, 'eval_strategy', 'eval_prompts')}; "
            "use --eval_strategy steps and some --eval_prompts"
        )
    if config.eval_against and not config.eval_judge:
        yield f"{_said(config, 'eval_against')} needs somebody who compares: give --eval_judge"
    if config.eval_judge and not config.eval_against:
        yield f"{_said(config, 'eval_judge')} has nothing to compare with: give --eval_against"
    if config.eval_against and config.eval_prompts == 0:
        yield f"{_said(config, 'eval_against')} needs prompts to compare on; use some --eval_prompts"


def _folders(config: RebelConfig) -> Complaints:
    if not config.output_dir.strip():
        yield "--output_dir is empty; name a folder for the run"
    if str(config.resume_from_checkpoint).endswith((".yaml", ".yml")):
        yield f"--resume {config.resume_from_checkpoint}: checkpoints are folders; put a YAML file before --resume"
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        yield "--overwrite_output_dir would delete the checkpoint that --resume goes on from; use one of them"
    if config.overwrite_output_dir:
        for name in ("model_name_or_path", "pipeline_name_or_path", "adapter_path", "dataset_name"):
            if _inside(getattr(config, name), config.output_dir):
                yield f"--overwrite_output_dir would delete {_said(config, name)}; use another --output_dir"


def _inside(path: str | None, folder: str) -> bool:
    return bool(path) and Path(path).exists() and Path(path).resolve().is_relative_to(Path(folder).resolve())


def _rewards(config: RebelConfig) -> Complaints:
    weights, functions = config.reward_weights, config.reward_funcs
    if weights is None:
        return
    judge = " and a --judge" if config.judge else ""
    if functions and len(weights) != len(functions) + bool(config.judge):
        yield (
            f"{_said(config, 'reward_weights')}: {len(weights)} for {len(functions)} --reward_funcs{judge}; "
            "give one for each"
        )
    if not all(map(isfinite, weights)):
        yield f"{_said(config, 'reward_weights')}: use finite numbers"


def _given(config: RebelConfig) -> Complaints:
    yield from _model(config)
    if not config.from_rollouts:
        yield from _prompts(config)
        yield from _reward(config)


def _model(config: RebelConfig) -> Complaints:
    if not config.model_name_or_path and not config.pipeline_name_or_path:
        yield (
            "no model: give --model_name_or_path a Hugging Face name or a folder, or --pipeline_name_or_path one of "
            "diffusers"
        )


def _prompts(config: RebelConfig) -> Complaints:
    if not config.dataset_name:
        yield "no prompts: give --dataset_name a hub name, a folder or a file"


def _reward(config: RebelConfig) -> Complaints:
    if not config.reward_funcs and not config.judge and not config.offline:
        yield (
            "no reward: give --reward_funcs a file.py:function, a name of trl.rewards or a reward model; or --judge "
            "what compares two completions; or --offline, if the data have completions with preferences or rewards"
        )


def _kind(config: RebelConfig) -> Complaints:
    """Language models and pipelines: what has no meaning for the one that is tuned."""
    if config.model_name_or_path and config.pipeline_name_or_path:
        yield "--model_name_or_path is a language model and --pipeline_name_or_path draws images; give one of them"
        return
    kind, foreign = ("images", OF_TEXT) if config.pipeline_name_or_path else ("text", OF_IMAGES)
    for name in foreign:
        if getattr(config, name) != known()[name].default:
            needed = "language models" if kind == "images" else "pipelines (--pipeline_name_or_path)"
            yield f"{_said(config, name)} is for {needed} and has no meaning for {kind}; leave it out"
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
            yield f"{_said(config, 'algorithm', 'pairing')}: PPO compares with the mean of all; use --pairing all"
        if config.kl_per_iteration is not None or config.early_stop:
            name = "early_stop" if config.early_stop else "kl_per_iteration"
            yield f"{_said(config, 'algorithm', name)}: that belongs to the regression of rebel; leave it out"


def _judge(config: RebelConfig) -> Complaints:
    if re.fullmatch(r"[A-Za-z_]\w*", config.judge_api_key_env) is None:  # not shown: it may be a key
        yield "--judge_api_key_env is no name of an environment variable; give the name, such as OPENAI_API_KEY"
    if config.judge_base_url is not None:
        if not re.match(r"https?://[^/]", config.judge_base_url):
            yield f"{_said(config, 'judge_base_url')}: an address such as http://127.0.0.1:8000/v1 is expected"
        elif "@" in config.judge_base_url or "?" in config.judge_base_url:  # not shown, for the same reason
            yield "--judge_base_url holds more than an address; the key goes into an environment variable"
    secret = [name for name in config.judge_args if re.search(r"key|auth|token$|secret|header", name, re.IGNORECASE)]
    if secret:
        yield f"--judge_args {secret[0]} looks like a key; that goes into an environment variable"
    remote = any((spec or "").startswith("openai:") for spec in (config.judge, config.eval_judge))
    if not remote and (config.judge_base_url or config.judge_args):
        name = "judge_base_url" if config.judge_base_url else "judge_args"
        yield f"--{name} is for a judge behind an endpoint: use --judge openai:MODEL, or leave it out"


def _vllm(config: RebelConfig) -> Complaints:
    if config.sampler != "vllm":
        yield from _no_vllm(config)
        return
    if config.load_in_4bit:
        yield "--sampler vllm with --load_in_4bit: it is not sent weights of 4 bits; use --sampler generate"
    if config.vllm_mode == "server":
        yield from _vllm_server(config)
    else:
        for name in ("vllm_server_base_url", "vllm_weights_dir"):
            if getattr(config, name) is not None:
                yield f"{_said(config, name)} is for a server: add --vllm_mode server"


def _no_vllm(config: RebelConfig) -> Complaints:
    for name, value in vars(config).items():
        if name.startswith("vllm_") and value != getattr(RebelConfig, name):
            yield f"--{name} is for vLLM: add --sampler vllm"


def _vllm_server(config: RebelConfig) -> Complaints:
    address = config.vllm_server_base_url
    if address is None:
        yield "--vllm_mode server: where it is is not given; use --vllm_server_base_url, as in http://127.0.0.1:8000"
    elif not re.fullmatch(r"https?://[^/@?]+(/[^@?]*)?", address):  # not shown: it may hold a key
        yield "--vllm_server_base_url: an address such as http://127.0.0.1:8000 is expected, without a key"


def _meanwhile(config: RebelConfig) -> Complaints:
    if config.sampler == "vllm" and (config.offline or config.from_rollouts):
        yield f"--sampler vllm with {'--offline' if config.offline else '--from_rollouts'}: nothing is drawn"
    if not config.one_step_ahead:
        return
    if config.sampler != "vllm" or config.vllm_mode != "server":
        yield "--one_step_ahead is for a vLLM server, which draws meanwhile: add --sampler vllm --vllm_mode server"
    if config.rounds is not None:
        yield "--one_step_ahead with --rounds: a round is drawn before anything is trained; use one of them"
    if config.replace_flat_groups:
        yield (
            f"{_said(config, 'replace_flat_groups')} with --one_step_ahead: which prompts come next is not known "
            "before this iteration is scored; use one of them"
        )


def _mixture(config: RebelConfig) -> Complaints:
    if config.mixture and config.average:
        yield f"{_said(config, 'mixture', 'average')}: both say what is evaluated; use one of them"
    if config.mixture and config.load_best_model_at_end:
        yield f"{_said(config, 'mixture')} evaluates no single policy that --load_best_model_at_end could keep"


def _adapter(config: RebelConfig) -> Complaints:
    adapter = config.adapter
    if config.load_in_4bit and not adapter:
        yield "--load_in_4bit without --use_peft: 4-bit weights cannot be trained themselves; add --use_peft"
    if config.reference == "base" and not adapter:
        yield "--reference base is the model without its adapter: add --use_peft, or use --reference model"
    if config.reference == "initial_adapter" and not config.adapter_path:
        yield "--reference initial_adapter is the trained adapter of --adapter_path, which is not given"


CHECKS = (
    *(_counts, _ranges, _eta, _sampling, _batch, _precision, _length, _no_large_batch, _evaluation, _folders),
    *(_rewards, _judge, _mixture, _adapter, _data, _kind, _vllm, _meanwhile),
)
INPUTS = (_given,)
