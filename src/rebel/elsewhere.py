"""Names of settings that are none of ours: where the meaning of those that users bring along went."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from fnmatch import fnmatch
from functools import wraps
from typing import Any, TypeVar

from rebel.errors import RebelError

Settings = TypeVar("Settings")

_NO_CLIPPING = "a regression clips no ratio; the length of a step is --eta, or --kl_per_iteration with --eta auto"
_ONE_LOSS = "there is one loss, the regression; --pairing and --kl choose its form"
_ITERATIONS = "give --iterations, --num_train_epochs or --max_steps; --num_iterations is passes over an iteration"
_BATCHES = (
    "--prompts_per_iteration times --num_generations is an iteration's batch, and --steps_per_iteration cuts it into "
    "steps; or give TRL's --per_device_train_batch_size and --gradient_accumulation_steps"
)
_REFERENCE = "the initial policy stays as it is; --beta is the price of leaving it"
_ENTROPY = "there is no bonus on the entropy; --beta keeps the policy near the initial one"
_SHARDED = "every process holds the whole model: `accelerate launch -m rebel train ...` starts several"
_ITSELF = "--dtype, --attn_implementation and --trust_remote_code are settings of their own"

ELSEWHERE = {
    "lr": "use --learning_rate",
    "epochs": _ITERATIONS,
    "num_epochs": _ITERATIONS,
    "batch_size": _BATCHES,
    "train_batch_size": _BATCHES,
    "per_device_batch_size": _BATCHES,
    "epsilon*": _NO_CLIPPING,
    "delta": _NO_CLIPPING,
    "importance_sampling_level": _NO_CLIPPING,
    "loss_type": _ONE_LOSS,
    "num_ppo_epochs": _ITERATIONS,
    "max_new_tokens": "use --max_completion_length",
    "use_vllm": "use --sampler vllm",
    "vllm_server_host": "use --vllm_server_base_url",
    "vllm_server_port": "use --vllm_server_base_url",
    "vllm_server_timeout": "use --vllm_deadline, which every answer of the server has to keep",
    "vllm_group_port": "weights reach a server through a folder: --vllm_weights_dir",
    "vllm_importance_sampling_*": "log-probabilities come from the trainer alone, and there is nothing to correct",
    "vllm_max_model_length": "it follows from --max_prompt_length and --max_completion_length",
    "vllm_tensor_parallel_size": "vLLM in this process has one device; a server may have several",
    "vllm_model_impl": "it is vLLM's own choice",
    "mask_truncated_completions": "use --drop_truncated",
    "num_generations_eval": "use --eval_generations",
    "per_device_eval_batch_size": "use --sampling_batch",
    "auto_find_batch_size": "memory is bounded by --tokens_per_micro_batch, which never changes the result",
    "warmup_ratio": "use --warmup_steps with a share below 1",
    "torch_dtype": "use --dtype",
    "model_init_kwargs": _ITSELF,
    "generation_kwargs": "completions are drawn from the plain distribution at --temperature",
    "disable_dropout": "dropout is always off",
    "lora_dropout": "dropout is always off",
    "load_in_8bit": "use --load_in_4bit",
    "sync_ref_model": _REFERENCE,
    "ref_model_*": _REFERENCE,
    "kl_coef": "use --beta, which is in reward per nat of a whole completion",
    "entropy_*": _ENTROPY,
    "top_entropy_quantile": _ENTROPY,
    "use_liger_kernel": "log-probabilities are taken in chunks in any case",
    "remove_unused_columns": "every column reaches the reward functions",
    "log_completions": "samples.jsonl and report.html show completions in any case",
    "reward_model_*": "put the reward model's name or folder into --reward_funcs",
    "eval_on_start": "the first evaluation is made in any case, before training",
    "eval_delay": "evaluations are made from the beginning; --eval_steps says how far apart",
    "do_train": "`rebel train` trains",
    "do_eval": "evaluations are made where there are prompts for them: --eval_prompts",
    "logging_first_step": "the first line is written in any case",
    "logging_strategy": "use --logging_steps",
    "num_completions_to_print": "samples.jsonl and report.html show completions in any case",
    "log_unique_prompts": "samples.jsonl and report.html show completions in any case",
    "save_only_model": "a checkpoint holds what resumes the run; use --save_strategy no for the final model alone",
    "save_safetensors": "weights are saved as safetensors in any case",
    "hub_token": "log in by `hf auth login`, or set HF_TOKEN",
    "hub_private_repo": "make the repository before, and name it by --hub_model_id",
    "hub_strategy": "the result is uploaded once, at the end",
    "hub_always_push": "the result is uploaded once, at the end",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing recomputes layers without reentrance",
    "torch_compile*": "the model is not compiled; compile it before it is given to RebelTrainer, if it can be",
    "tf32": "set torch.backends.cuda.matmul.allow_tf32 in Python",
    "dataloader_*": "prompts are in memory, and no loader is needed",
    "shuffle_dataset": "prompts are shuffled by --seed in any case",
    "data_seed": "use --seed",
    "full_determinism": "a run is repeatable from its --seed in any case",
    "cache_implementation": "the sampler has a cache of its own",
    "ddp_*": "accelerate is set up by `accelerate config`",
    "fsdp*": _SHARDED,
    "deepspeed": _SHARDED,
}


def explanation(name: str) -> str | None:
    """Where the meaning of an argument of TRL or transformers went, for those that users bring along."""
    return next((reason for pattern, reason in ELSEWHERE.items() if fnmatch(name, pattern)), None)


def unknown(name: str, names: Iterable[str]) -> str:
    """What to say of an unknown setting: where its meaning went, or which one was probably meant."""
    if reason := explanation(name):
        return f"--{name} is not a setting of REBEL: {reason}"
    near = difflib.get_close_matches(name, names, n=1)
    return f"--{name} is not known; " + (f"did you mean --{near[0]}?" if near else "--help lists what is")


def explaining(kind: type[Settings]) -> type[Settings]:
    """The dataclass of settings, whose constructor answers names it does not know with what to do, all at once."""
    made, names = kind.__init__, [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]

    @wraps(made)
    def init(self: Any, *given: Any, **named: Any) -> None:
        problems = [unknown(name, names) for name in named if name not in names]
        if problems:
            raise RebelError("\n".join(problems))
        made(self, *given, **named)

    kind.__init__ = init
    return kind
