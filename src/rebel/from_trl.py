"""What TRL's names become here: its batch arguments translated, the arguments without a meaning explained."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

from rebel.config import RebelConfig
from rebel.errors import RebelError

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
    "fsdp*": _SHARDED,
    "deepspeed": _SHARDED,
}

BATCH = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
)
_DEFAULT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def explanation(name: str) -> str | None:
    """Where the meaning of an argument of TRL or transformers went, for those that users bring along."""
    return next((reason for pattern, reason in ELSEWHERE.items() if fnmatch(name, pattern)), None)


def translate_batch(config: RebelConfig, world_size: int) -> tuple[RebelConfig, list[str]]:
    """The settings in words of prompts and steps, and lines that say how they follow from TRL's arguments."""
    given = {name: value for name in BATCH if (value := getattr(config, name)) is not None}
    if not given:
        return config, []
    _check_counts(given)
    if config.offline:
        return _offline_batch(config, given, world_size)
    completions, minibatches = _generation(given, world_size)
    ours = {
        "prompts_per_iteration": _whole(completions, config.num_generations, "completions", "num_generations"),
        "steps_per_iteration": _steps(minibatches, given),
    }
    _check_agreement(config, ours)
    translated = replace(config, **ours, **dict.fromkeys(BATCH))
    return translated, _lines(given, world_size, completions, translated)


def _offline_batch(config: RebelConfig, given: dict[str, int], world_size: int) -> tuple[RebelConfig, list[str]]:
    """As in TRL's DPOTrainer a batch is of rows, and a step takes those of all devices and accumulated batches."""
    wrong = [name for name in given if name not in _DEFAULT]
    if wrong:
        raise RebelError(f"--{wrong[0]} with --offline: nothing is generated; use --prompts_per_iteration")
    settings = _DEFAULT | given
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * world_size
    ours = {"prompts_per_iteration": rows * config.steps_per_iteration}
    _check_agreement(config, ours)
    said = f"TRL's batch arguments: {rows} rows a step. In our words: prompts_per_iteration "
    line = f"{said}{ours['prompts_per_iteration']} in {config.steps_per_iteration} steps_per_iteration"
    return replace(config, **ours, **dict.fromkeys(BATCH)), [line]


def _check_counts(given: dict[str, int]) -> None:
    for name, value in given.items():
        if value < 1:
            raise RebelError(f"--{name} {value}: use 1 or more")
    if "generation_batch_size" in given and "steps_per_generation" in given:
        raise RebelError("--generation_batch_size and --steps_per_generation say the same; give one of them")


def _generation(given: dict[str, int], world_size: int) -> tuple[int, int]:
    """Completions of one generation over all processes, and the micro-batches that TRL cuts them into."""
    settings = _DEFAULT | given
    at_once = settings["per_device_train_batch_size"] * world_size
    if "generation_batch_size" in given:
        completions = given["generation_batch_size"]
        at_once_name = "per_device_train_batch_size x processes"
        return completions, _whole(completions, at_once, "generation_batch_size", at_once_name)
    minibatches = settings.get("steps_per_generation", settings["gradient_accumulation_steps"])
    return at_once * minibatches, minibatches


def _steps(minibatches: int, given: dict[str, int]) -> int:
    accumulated = given.get("gradient_accumulation_steps", 1)
    return _whole(minibatches, accumulated, "steps_per_generation", "gradient_accumulation_steps")


def _whole(total: int, part: int, total_name: str, part_name: str) -> int:
    if part < 1 or total % part:
        raise RebelError(f"{total} ({total_name}) is no multiple of {part} ({part_name}); change one of them")
    return total // part


def _check_agreement(config: RebelConfig, ours: dict[str, int]) -> None:
    for name, value in ours.items():
        if getattr(config, name) not in (value, getattr(RebelConfig, name)):
            raise RebelError(
                f"--{name} {getattr(config, name)} contradicts TRL's batch arguments, which say {value}; "
                f"give either --{name} or " + ", ".join(f"--{name}" for name in BATCH)
            )


def _lines(given: dict[str, int], world_size: int, completions: int, ours: RebelConfig) -> list[str]:
    said = ", ".join(f"{name} {value}" for name, value in (_DEFAULT | given).items())
    processes = "1 process" if world_size == 1 else f"{world_size} processes"
    return [
        f"TRL's {said} on {processes}: {completions} completions an iteration. In our words:",
        f"  prompts_per_iteration {ours.prompts_per_iteration} (of {ours.num_generations} completions)",
        f"  steps_per_iteration {ours.steps_per_iteration} (and num_iterations {ours.passes})",
        f"  tokens_per_micro_batch {ours.tokens_per_micro_batch} (this alone sets the memory of training)",
    ]
