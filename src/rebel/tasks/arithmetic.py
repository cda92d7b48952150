"""`rebel quickstart`: a model that forgets to carry learns, from right and wrong alone, to add.

Everything is made here: the problems, the model, and its first, supervised lessons from worked examples that often
forget the carry (47+38=75). REBEL then draws the model's own answers to problems, and the verifier `exact` is its
only teacher. The held-out problems are in neither.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rebel.config import RebelConfig
from rebel.data import shuffled
from rebel.errors import RebelError
from rebel.job import quiet, run_training
from rebel.record import METRICS, SETTINGS, claim_folder
from rebel.tasks.pretrain import Recipe, character_tokenizer, lessons, save, small_llama, teach
from rebel.validate import validate

ALPHABET = "0123456789+="
POSITIONS = 16
HELD_OUT = 1000
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
        model_name_or_path=str(folder / "initial"),
        dataset_name=str(folder / "problems"),
        dataset_test_split="test",
        eval_prompts=HELD_OUT,
        reward_funcs=["rebel.tasks.arithmetic:exact"],
        max_completion_length=4,
        prompts_per_iteration=128,
        num_generations=8,
        sampling_batch=1024,
        steps_per_iteration=8,
        num_iterations=1,
        tokens_per_micro_batch=32768,
        iterations=60,
        learning_rate=5e-5,
        average=0.3,
        eval_temperature=0.0,
        track_kl=True,
        logging_steps=10**9,
        eval_steps=80,
        save_strategy="no",
        use_cpu=True,
        output_dir=str(folder),
        seed=seed,
    )


def quickstart(output_dir: str, seed: int, recipe: Recipe = RECIPE, **changes: Any) -> None:
    """`rebel quickstart`: the problems, the model that is to be improved, REBEL, and what came of it.

    `changes` are to the settings of the run.
    """
    began, folder = time.monotonic(), Path(output_dir)
    config = validate(RebelConfig(**vars(settings(folder, seed)) | changes))
    make_folder(config)
    quiet()
    parts = problems(seed)
    print(f"1. A small Llama learns two-digit addition from {len(parts.training):,} worked examples, by ordinary")
    print(f"   supervised learning. {FORGOTTEN:.0%} of those with a carry forget it (47+38=75).", flush=True)
    model = prepare(parts, folder, recipe, seed)
    print(f"   {model.num_parameters():,} parameters, {time.monotonic() - began:.0f} s: {folder / 'initial'}\n")
    print("2. REBEL: the model answers the problems itself, and all it is told is which answers are right.")
    print(f"   eval is the share of {len(parts.held_out):,} held-out problems it then answers right, greedily.\n")
    run_training(config)
    print("\n" + summary(folder, time.monotonic() - began))


def prepare(parts: Problems, folder: Path, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """The model that is to be improved; it and the problems are written where the settings of the run expect them."""
    model, tokenizer = careless_model(parts.training, recipe, seed)
    save(model, tokenizer, folder / "initial")
    write_problems(parts, folder / "problems")
    return model


def make_folder(config: RebelConfig) -> None:
    """The output folder, unless it holds another run."""
    folder = Path(config.output_dir)
    if (folder / SETTINGS).exists() or (folder / METRICS).exists():
        raise RebelError(f"--output_dir {folder} holds another run: delete it, or name another folder")
    claim_folder(config, resume=False)


def write_problems(parts: Problems, folder: Path) -> None:
    """Both parts as the files of a data set: what `rebel train` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sums in (("train", parts.training), ("test", parts.held_out)):
        rows = [json.dumps({"prompt": s.prompt, "answer": s.answer}) for s in sums]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def summary(folder: Path, seconds: float) -> str:
    """What came of it, and what to do next."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return "\n".join(
        [
            f"Held-out problems answered right: {share(rows[0])} before REBEL, {share(rows[-1])} after "
            f"{rows[-1]['samples']:,} answers of its own.",
            f"All of it took {seconds:.0f} s. Plots, and answers before and after: {folder / 'report.html'}",
            "",
            f'Next:  rebel sample {folder} --prompt "47+38="',
            f"       rebel train {folder / SETTINGS} --beta 0.05 --output_dir {folder}-2",
        ]
    )


def share(row: Mapping[str, Any]) -> str:
    return f"{row['eval/reward']:.1%}"
