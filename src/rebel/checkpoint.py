"""What resumes a run: the policy as Hugging Face saves it, the optimiser, and the loop's own numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file

from rebel.errors import RebelError
from rebel.learner import Learner

PREFIX, TRAINED = "checkpoint-", "trained.safetensors"


@dataclass(slots=True)
class Progress:
    """Where the loop stands, at the end of an iteration."""

    iteration: int = 0
    step: int = 0
    samples: int = 0
    prompts_taken: int = 0
    best: float | None = None
    settings: str = ""


def save(folder: Path, learner: Learner, save_model: Any, progress: Progress, rng: dict[str, Any]) -> Path:
    """Write checkpoint-<step> below `folder`; the name appears only once all of it is on disk.

    `rng` is the state of the generators at the end of the iteration, before anything of the next one used them.
    """
    target = folder / f"{PREFIX}{progress.step}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(partial)
    save_weights(learner.weights, partial)
    save_file(tensors(learner.averaged), partial / "averaged.safetensors")
    torch.save(
        {
            "optimizer": learner.optimizer.state_dict(),
            "scheduler": learner.scheduler.state_dict(),
            "rng": rng,
        },
        partial / "optimizer.pt",
    )
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    return target


def load(checkpoint: Path, learner: Learner, settings: str) -> Progress:
    """Put the learner back to where the checkpoint was written."""
    progress = read_progress(checkpoint)
    if progress.settings != settings:
        raise RebelError(differing(checkpoint, progress.settings, settings))
    load_weights(learner.weights, checkpoint)
    averaged = load_file(checkpoint / "averaged.safetensors")
    learner.averaged = [torch.empty_like(weight) for weight in learner.weights] if averaged else []
    restore(learner.averaged, averaged)
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scheduler.load_state_dict(state["scheduler"])
    set_rng_state(state["rng"])
    learner.steps = progress.step
    return progress


def read_progress(checkpoint: Path) -> Progress:
    try:
        return Progress(**json.loads((checkpoint / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RebelError(f"--resume_from_checkpoint {checkpoint} is no checkpoint of rebel: {error}") from error


def differing(checkpoint: Path, old: str, new: str) -> str:
    """The settings that changed since the checkpoint, in words."""
    before, after = json.loads(old or "{}"), json.loads(new or "{}")
    changes = [
        f"--{k} was {before.get(k)}, is {after.get(k)}"
        for k in sorted({*before, *after})
        if before.get(k) != after.get(k)
    ]
    return f"{checkpoint} belongs to another configuration: {'; '.join(changes)}. Resume with the old values"


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit() and (p / "progress.json").exists()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def prune(folder: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for old in all_checkpoints(folder)[: -keep if keep else None] if keep else []:
        shutil.rmtree(old)


def save_weights(weights: list[torch.Tensor], folder: Path) -> None:
    """Write the trained weights, in full precision, beside a saved policy."""
    save_file(tensors(weights), folder / TRAINED)


def load_weights(weights: list[torch.Tensor], folder: Path) -> None:
    """Put the trained weights back to what they were."""
    restore(weights, load_file(folder / TRAINED))


def tensors(weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(k): weight.detach().contiguous().cpu() for k, weight in enumerate(weights)}


@torch.no_grad()
def restore(weights: list[torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    for k, weight in enumerate(weights):
        weight.copy_(saved[str(k)])


def rng_state() -> dict[str, Any]:
    """State of the generators that a reward function may use; sampling has seeds of its own."""
    state: Any = numpy.random.get_state()
    kind, words, *rest = state
    numpy_state = [kind, torch.from_numpy(words.astype("int64")), *rest]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}


def set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, words, *rest = state["numpy"]
    numpy.random.set_state((kind, words.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
