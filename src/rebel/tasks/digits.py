"""`rebel quickstart images`: a model that draws digits well, but often the wrong one, learns to draw those asked for.

Nothing is downloaded: the 1,797 handwritten digits are real and come with scikit-learn. The model first learns them
with half of the labels shuffled. REBEL's only teacher is then a logistic regression that says how likely a drawing
shows the digit that was asked for. What judges the outcome is a support vector machine, of another kind and fitted to
other pictures, which is never the reward.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from rebel.job import quiet, run_training
from rebel.record import METRICS, SETTINGS
from rebel.tasks.arithmetic import make_folder
from rebel.tasks.digits_model import SIDE, DigitsPipeline, Recipe, as_latents, digit_of, taught
from rebel.validate import validate

RECIPE = Recipe()
HELD_OUT = 1000
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


def write_prompts(folder: Path) -> None:
    """The ten digits to train on, and each a hundred times in turn to evaluate on, as files of a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 10), ("test", HELD_OUT)):
        rows = [json.dumps({"prompt": str(k % 10)}) for k in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def settings(folder: Path, seed: int) -> RebelConfig:
    """The run: like any other, it could be started by `rebel train` with these settings."""
    return RebelConfig(
        pipeline_name_or_path=str(folder / "initial"),
        use_peft=False,
        dataset_name=str(folder / "prompts"),
        dataset_test_split="test",
        eval_prompts=HELD_OUT,
        reward_funcs=["rebel.tasks.digits:log_probability"],
        judge_funcs=["rebel.tasks.digits:svm_accuracy"],
        denoising_steps=10,
        noise_level=1.0,
        credit="step",
        eta=20.0,
        beta=0.03,
        prompts_per_iteration=16,
        num_generations=8,
        sampling_batch=1024,
        steps_per_iteration=4,
        num_iterations=1,
        images_per_micro_batch=128,
        iterations=40,
        learning_rate=1e-3,
        logging_steps=10**9,
        eval_steps=20,
        save_strategy="no",
        use_cpu=True,
        output_dir=str(folder),
        seed=seed,
    )


def quickstart(output_dir: str, seed: int, recipe: Recipe = RECIPE, **changes: Any) -> None:
    """`rebel quickstart images`: the model that is to be improved, REBEL, and what came of it.

    `changes` are to the settings of the run.
    """
    began, folder = time.monotonic(), Path(output_dir)
    config = validate(RebelConfig(**vars(settings(folder, seed)) | changes))
    make_folder(config)
    quiet()
    print(f"1. A small diffusion model learns to draw from {len(written().digit):,} real handwritten digits,")
    print(
        f"   {recipe.shuffled:.0%} of their labels shuffled: it draws well, and often another digit than asked.",
        flush=True,
    )
    pipeline = prepare(folder, recipe, seed)
    size = sum(weight.numel() for weight in pipeline.denoiser.parameters())
    print(f"   {size:,} parameters, {time.monotonic() - began:.0f} s: {folder / 'initial'}\n")
    print(
        "2. REBEL: the model draws, and all it is told is how likely a logistic regression finds the digit asked for."
    )
    print("   judge is the share that a support vector machine, never a teacher, takes for that digit.\n")
    run_training(config)
    print("\n" + summary(folder, time.monotonic() - began))


def prepare(folder: Path, recipe: Recipe, seed: int) -> DigitsPipeline:
    """The model that is to be improved; it and the prompts are written where the settings of the run expect them."""
    pipeline = careless_pipeline(recipe, seed)
    pipeline.save_pretrained(folder / "initial")
    write_prompts(folder / "prompts")
    return pipeline


def summary(folder: Path, seconds: float) -> str:
    """What came of it, and what to do next."""
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    before, after = (row["eval/judge/svm_accuracy"] for row in (rows[0], rows[-1]))
    return "\n".join(
        [
            f"Drawings that show the digit asked for, by the judge: {before:.1%} before REBEL, {after:.1%} after "
            f"{rows[-1]['samples']:,} drawings of its own.",
            f"All of it took {seconds:.0f} s. Plots, and drawings before and after: {folder / 'report.html'}",
            "",
            f"Next:  rebel sample {folder} --prompt 7",
            f"       rebel train {folder / SETTINGS} --beta 0.05 --output_dir {folder}-2",
        ]
    )
