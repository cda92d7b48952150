"""TRL's batch arguments, translated into ours."""

from __future__ import annotations

from dataclasses import replace

from rebel.config import RebelConfig
from rebel.errors import RebelError

BATCH = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
)
_DEFAULT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


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
    plain = ours.steps_per_iteration * ours.passes == 1
    return [
        f"TRL's {said} on {processes}: {completions} completions an iteration. In our words:",
        f"  prompts_per_iteration {ours.prompts_per_iteration} (of {ours.num_generations} completions)",
        f"  steps_per_iteration {ours.steps_per_iteration} (and num_iterations {ours.passes})",
        f"  tokens_per_micro_batch {ours.tokens_per_micro_batch} (this alone sets the memory of training)",
        *(["  one step an iteration: this is RLOO's gradient, and eta has no effect"] if plain else []),
    ]
