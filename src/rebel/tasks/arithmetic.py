"""`rebel quickstart`: a model that forgets to carry learns, from right and wrong alone, to add.

Everything is made here: the problems, the model, and its first, supervised lessons from worked examples that often
forget the carry (47+38=75). REBEL then draws the model's own answers to problems, and the verifier `exact` is its
only teacher. The held-out problems are in neither.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rebel.config import RebelConfig
from rebel.data import shuffled
from rebel.tasks.pretrain import Recipe, character_tokenizer, lessons, save, small_llama, teach
from rebel.tasks.quickstart import HELD_OUT, INITIAL, SHARED, Show, run, write_rows

ALPHABET = "0123456789+="
POSITIONS = 16
RECIPE = Recipe()
FORGOTTEN = 0.65
"""Share of the worked examples with a carry that leave it out."""


@dataclass(frozen=True, slots=True)
class Sum:
    """An addition of two two-digit numbers."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)

    @property
    def carries(self) -> bool:
        return self.a % 10 + self.b % 10 >= 10

    @property
    def careless_answer(self) -> str:
        """What comes out if the units' carry is forgotten."""
        return str(self.a + self.b - 10 * self.carries)


@dataclass(frozen=True, slots=True)
class Problems:
    """All additions of two two-digit numbers, in two parts that share none."""

    training: list[Sum]
    held_out: list[Sum]


def problems(seed: int) -> Problems:
    """Which problems are held out depends on the seed alone."""
    every = [Sum(a, b) for a in range(10, 100) for b in range(10, 100)]
    mixed = [every[i] for i in shuffled(len(every), seed)]
    return Problems(mixed[HELD_OUT:], mixed[:HELD_OUT])


def worked_examples(sums: Sequence[Sum], count: int, seed: int) -> list[tuple[str, str]]:
    """Problems drawn at random, with answers as a careless teacher writes them down."""
    dice = random.Random(seed)
    drawn = dice.choices(sums, k=count)
    return [(s.prompt, s.careless_answer if dice.random() < FORGOTTEN else s.answer) for s in drawn]


def exact(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for a completion that is the answer to the letter, else 0."""
    return [float(given == right) for given, right in zip(completions, answer, strict=True)]


def careless_model(sums: Sequence[Sum], recipe: Recipe, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model that has learnt to add from worked examples, and with them to forget the carry."""
    tokenizer = character_tokenizer(ALPHABET)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = small_llama(tokenizer, recipe, POSITIONS)
    teach(model, lessons(tokenizer, worked_examples(sums, recipe.examples, seed)), recipe)
    return model, tokenizer


def settings(folder: Path, seed: int) -> RebelConfig:
    """The run: like any other, it could be started by `rebel train` with these settings."""
    return RebelConfig(
        **SHARED,
        model_name_or_path=str(folder / INITIAL),
        dataset_name=str(folder / "problems"),
        reward_funcs=["rebel.tasks.arithmetic:exact"],
        max_completion_length=4,
        prompts_per_iteration=128,
        steps_per_iteration=8,
        tokens_per_micro_batch=32768,
        iterations=60,
        learning_rate=5e-5,
        average=0.3,
        eval_temperature=0.0,
        track_kl=True,
        eval_steps=80,
        output_dir=str(folder),
        seed=seed,
    )


def quickstart(output_dir: str, seed: int, recipe: Recipe = RECIPE, **changes: Any) -> None:
    """`rebel quickstart`: the problems, the model that is to be improved, REBEL, and what came of it.

    `changes` are to the settings of the run.
    """
    folder, parts = Path(output_dir), problems(seed)
    show = Show(
        teaching=f"A small Llama learns two-digit addition from {len(parts.training):,} worked examples, by ordinary\n"
        f"   supervised learning. {FORGOTTEN:.0%} of those with a carry forget it (47+38=75).",
        prepare=lambda: prepare(parts, folder, recipe, seed).num_parameters(),
        learning="REBEL: the model answers the problems itself, and all it is told is which answers are right.\n"
        f"   eval is the share of {len(parts.held_out):,} held-out problems it then answers right, greedily.",
        outcome=outcome,
        report="answers",
        prompt='"47+38=" --temperature 0 --n 1',
    )
    run(show, replace(settings(folder, seed), **changes))


def prepare(parts: Problems, folder: Path, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """The model that is to be improved; it and the problems are written where the settings of the run expect them."""
    model, tokenizer = careless_model(parts.training, recipe, seed)
    save(model, tokenizer, folder / INITIAL)
    rows = [[{"prompt": s.prompt, "answer": s.answer} for s in sums] for sums in (parts.training, parts.held_out)]
    write_rows(folder / "problems", *rows)
    return model


def outcome(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Before and after, in words."""
    return (
        f"Held-out problems answered right: {first['eval/reward']:.1%} before REBEL, {last['eval/reward']:.1%} after "
        f"{last['samples']:,} answers of its own."
    )
