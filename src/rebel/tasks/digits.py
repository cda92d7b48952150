"""`rebel quickstart images`: a model that draws digits well, but often the wrong one, learns to draw those asked for.

Nothing is downloaded: the 1,797 handwritten digits are real and come with scikit-learn. The model first learns them
with half of the labels shuffled. REBEL's only teacher is then a logistic regression that says how likely a drawing
shows the digit that was asked for. What judges the outcome is a support vector machine, of another kind and fitted to
other pictures, which is never the reward.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from rebel.config import RebelConfig
from rebel.tasks.digits_model import SIDE, DigitsPipeline, Recipe, as_latents, digit_of, taught
from rebel.tasks.quickstart import HELD_OUT, INITIAL, SHARED, Show, run, write_rows

RECIPE = Recipe()
INK = 16
LEAST = -5.0
"""Lowest reward: a drawing that is surely another digit need not be told apart from one that is yet surer."""


@dataclass(frozen=True, slots=True)
class Written:
    """Real handwritten digits: ink from 0 to 1 at 64 places, and which digit it is."""

    ink: Float[np.ndarray, "N 64"]
    digit: np.ndarray


@functools.cache
def written() -> Written:
    """All of those that come with scikit-learn."""
    data: Any = load_digits()
    return Written(data.data / INK, data.target)


@functools.cache
def teacher() -> LogisticRegression:
    """The reward's classifier, fitted to every other picture."""
    return LogisticRegression(max_iter=2000).fit(written().ink[::2], written().digit[::2])


@functools.cache
def examiner() -> SVC:
    """The judge's classifier, fitted to the pictures that the teacher has not seen."""
    return SVC(C=10).fit(written().ink[1::2], written().digit[1::2])


def ink_of(images: Sequence[Image.Image]) -> Float[np.ndarray, "N 64"]:
    """What the classifiers read of drawings of any size."""
    small = [image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(each, dtype=np.float64).ravel() / 255 for each in small])


def log_probability(images: Sequence[Image.Image], prompts: Sequence[str], **kwargs: Any) -> list[float]:
    """The reward: log-probability, in nats, that a drawing shows the digit of its prompt; never below -5."""
    asked = [digit_of(prompt) for prompt in prompts]
    logp = teacher().predict_log_proba(ink_of(images))[np.arange(len(asked)), asked]
    return np.maximum(logp, LEAST).tolist()


def svm_accuracy(images: Sequence[Image.Image], prompts: Sequence[str], **kwargs: Any) -> list[float]:
    """The judge: 1 for a drawing that the support vector machine takes for the digit of its prompt, else 0."""
    asked = np.array([digit_of(prompt) for prompt in prompts])
    return (examiner().predict(ink_of(images)) == asked).astype(float).tolist()


def careless_pipeline(recipe: Recipe, seed: int) -> DigitsPipeline:
    """A model that has learnt to draw digits, with labels of which half were shuffled."""
    data = written()
    return taught(as_latents(data.ink), torch.as_tensor(data.digit), recipe, seed)


def settings(folder: Path, seed: int) -> RebelConfig:
    """The run: like any other, it could be started by `rebel train` with these settings."""
    return RebelConfig(
        **SHARED,
        pipeline_name_or_path=str(folder / INITIAL),
        use_peft=False,
        dataset_name=str(folder / "prompts"),
        reward_funcs=["rebel.tasks.digits:log_probability"],
        judge_funcs=["rebel.tasks.digits:svm_accuracy"],
        denoising_steps=10,
        noise_level=1.0,
        credit="step",
        eta=20.0,
        beta=0.03,
        prompts_per_iteration=16,
        steps_per_iteration=4,
        images_per_micro_batch=128,
        iterations=40,
        learning_rate=1e-3,
        eval_steps=20,
        output_dir=str(folder),
        seed=seed,
    )


def quickstart(output_dir: str, seed: int, recipe: Recipe = RECIPE, **changes: Any) -> None:
    """`rebel quickstart images`: the model that is to be improved, REBEL, and what came of it.

    `changes` are to the settings of the run.
    """
    folder = Path(output_dir)
    show = Show(
        teaching=f"A small diffusion model learns to draw from {len(written().digit):,} real handwritten digits,\n"
        f"   {recipe.shuffled:.0%} of their labels shuffled: it draws well, and often another digit than asked.",
        prepare=lambda: size(prepare(folder, recipe, seed)),
        learning="REBEL: the model draws, and all it is told is how likely a logistic regression finds the digit asked "
        "for.\n   judge is the share that a support vector machine, never a teacher, takes for that digit.",
        outcome=outcome,
        report="drawings",
        prompt="7",
    )
    run(show, replace(settings(folder, seed), **changes))


def size(pipeline: DigitsPipeline) -> int:
    """Parameters of the model that draws."""
    return sum(weight.numel() for weight in pipeline.denoiser.parameters())


def prepare(folder: Path, recipe: Recipe, seed: int) -> DigitsPipeline:
    """The model that is to be improved; it and the prompts are written where the settings of the run expect them.

    The prompts are the ten digits to train on, and each a hundred times in turn to evaluate on.
    """
    pipeline = careless_pipeline(recipe, seed)
    pipeline.save_pretrained(folder / INITIAL)
    train, test = ([{"prompt": str(k % 10)} for k in range(count)] for count in (10, HELD_OUT))
    write_rows(folder / "prompts", train, test)
    return pipeline


def outcome(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Before and after, in words."""
    before, after = (row["eval/judges/svm_accuracy"] for row in (first, last))
    return (
        f"Drawings that show the digit asked for, by the judge: {before:.1%} before REBEL, {after:.1%} after "
        f"{last['samples']:,} drawings of its own."
    )
