"""The settings of `rebel sft` and `rebel reward-model`: some of our own, and all that TRL knows. Imports no torch."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rebel.errors import RebelError
from rebel.settings import read_yaml


def setting(help: str, default: Any = None) -> Any:
    """A field with its help text, as the argument parser of transformers reads it."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class StageData:
    """Where the rows of a stage come from."""

    dataset_name: str | None = setting("A hub name, a folder, or a .jsonl, .json, .csv, .parquet or .txt file.")
    dataset_config: str | None = setting("Configuration of a hub dataset.")
    dataset_train_split: str = setting("Split to train on.", "train")
    dataset_test_split: str | None = setting("Split to evaluate on; needs a dataset with several splits.")
    eval_rows: int = setting("Without a test split: the last so many rows are kept out of training for it.", 0)
    prompt_column: str = setting("Column with the prompts: text, or chat messages.", "prompt")
    overwrite_output_dir: bool = setting("Replace what a former run of this command left in output_dir.", False)


@dataclass(frozen=True)
class SftData(StageData):
    """Prompts with completions, whole texts (column `text`), or chats (column `messages`)."""

    completion_column: str = setting(
        "Column with the completions; trained on alone, without the prompts.", "completion"
    )


@dataclass(frozen=True)
class PreferenceData(StageData):
    """Two completions of each prompt, and which of them is better."""

    pair_columns: list[str] = setting(  # noqa: RUF009
        "The columns of the better and of the worse completion; the first and the second with preference_column.",
        ["chosen", "rejected"],
    )
    preference_column: str | None = setting(
        "A column of numbers: above preference_tie the first of the pair is better, below it the second."
    )
    preference_tie: float = setting(
        "The number without a winner: 0.5 where the column is a probability or a share of votes, 0 for a margin.", 0.5
    )


@dataclass(frozen=True)
class Stage:
    """A command: what it is called, the class that its data settings go into, and TRL's names for its parts."""

    name: str
    record: str
    output_dir: str
    data: type[StageData]
    config: str
    about: str


SFT = Stage(
    "sft",
    "sft.yaml",
    "rebel-sft",
    SftData,
    "SFTConfig",
    "Train a model on completions that are written already, by TRL's SFTTrainer. The output folder is a "
    "--model_name_or_path of `rebel train` and of `rebel reward-model`.",
)
REWARD_MODEL = Stage(
    "reward-model",
    "reward_model.yaml",
    "rebel-reward-model",
    PreferenceData,
    "RewardConfig",
    "Train a reward model on pairs of completions of which one is better, by TRL's RewardTrainer. The output folder "
    "is one of the --reward_funcs of `rebel train`.",
)

ESSENTIAL = {
    "model_name_or_path": "Hugging Face name or folder of the model to begin with.",
    "output_dir": "Folder of the result.",
    "num_train_epochs": "Passes over the data (TRL: 3).",
    "max_steps": "Optimiser steps, instead of passes.",
    "learning_rate": "Peak learning rate.",
    "per_device_train_batch_size": "Rows in one forward pass.",
    "gradient_accumulation_steps": "Forward passes in one optimiser step.",
    "max_length": "Longest row in tokens (TRL: 1024; never more than the model has positions for).",
    "chat_template_path": "A chat template for a model that has none.",
    "use_peft": "Train a LoRA adapter, and merge it into the model at the end (lora_r, lora_alpha, ...).",
    "bf16": "Mixed precision (TRL: on, where a GPU has it).",
    "gradient_checkpointing": "Recompute activations in the backward pass (TRL: on).",
    "eval_strategy": "no, steps or epoch.",
    "seed": "Seed of everything random.",
}


def named(stage: Stage) -> tuple[str, ...]:
    """The settings that the help names."""
    return (*(f.name for f in fields(stage.data)), *ESSENTIAL)


def help_of(stage: Stage) -> str:
    """The settings as text: ours, the essential ones of TRL, and where the others are."""
    own = {f.name: f.metadata["help"] for f in fields(stage.data)}
    lines = [
        "data:",
        *_entries(own),
        "",
        f"model and training, all names of trl's {stage.config} and ModelConfig, such as:",
    ]
    return "\n".join([*lines, *_entries(ESSENTIAL)])


def _entries(texts: Mapping[str, str]) -> list[str]:
    wrap = textwrap.TextWrapper(width=110, initial_indent=" " * 32, subsequent_indent=" " * 32)
    return [f"  --{name:<27} ".ljust(32) + wrap.fill(text).lstrip() for name, text in texts.items()]


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """The settings of `[config.yaml] [--NAME VALUE ...]`, flags over the file; names are checked later."""
    path, flags = (words[0], words[1:]) if words and not words[0].startswith("-") else (None, words)
    given: dict[str, Any] = {}
    values: list[str] | None = None
    for word in flags:
        named = re.fullmatch(r"--(\w[\w-]*)(?:=(.*))?", word, re.DOTALL)
        if named:
            values = given[named[1].replace("-", "_")] = [] if named[2] is None else [named[2]]
        elif values is None:
            raise RebelError(f"unexpected: {word}; settings are given as --NAME VALUE, after one YAML file at most")
        else:
            values.append(word)
    return {**read_yaml(path), **{name: _plain(values) for name, values in given.items()}}


def _plain(values: list[str]) -> Any:
    """One value as itself, several as a list; a flag that stands alone is true."""
    return True if not values else values[0] if len(values) == 1 else values
