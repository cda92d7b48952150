"""Iterates of a run on disk: the weights that are trained (an adapter alone, if that is what is trained) by name.

Where preferences go round in circles so do the iterates, and what converges is their mixture: the policy that picks
one of them for each completion. No weights are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rebel.errors import RebelError

FOLDER = "iterates"

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Iterates:
    """Up to `most` iterates of a run in `folder`, evenly spaced over its `total` iterations.

    `weights` are the parameters of the policy that is trained, by name.
    """

    folder: Path
    weights: Weights
    most: int = 1
    total: int = 1

    def stored(self) -> list[Path]:
        """The files, oldest first."""
        found = [path for path in self.folder.glob("*.safetensors") if path.stem.isdigit()]
        return sorted(found, key=iteration_of)

    def wanted(self) -> list[int]:
        """Iterations to keep: the last one, and those that divide the run into equal parts with it."""
        parts = min(self.most, self.total)
        return [-(-k * self.total // parts) for k in range(1, parts + 1)]

    def begin(self, iteration: int) -> None:
        """Forget what lies beyond `iteration`, and thin out what a shorter run had kept."""
        files = {iteration_of(path): path for path in self.stored()}
        past = [k for k in files if k <= iteration]
        near = {min(past, key=lambda k: abs(k - goal)) for goal in self.wanted() if goal <= iteration and past}
        for k, path in files.items():
            if k not in near:
                path.unlink()

    def keep(self, iteration: int) -> None:
        """Store the weights as they are, if this iteration is one to keep; the name appears once all is on disk."""
        if iteration not in self.wanted():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{iteration}.safetensors"
        partial = target.with_suffix(".partial")
        save_file({name: weight.detach().cpu().contiguous() for name, weight in self.weights.items()}, partial)
        os.replace(partial, target)

    @contextmanager
    def loaded(self, file: Path) -> Iterator[None]:
        """Within this context the parameters have the values of a stored iterate."""
        values = load_file(file)
        missing = [name for name in values if name not in self.weights]
        if missing:
            raise RebelError(f"{file} is of another model: there is no {missing[0]} in this one")
        before = {name: self.weights[name].detach().clone() for name in values}
        put(self.weights, values)
        try:
            yield
        finally:
            put(self.weights, before)


def iteration_of(path: Path) -> int:
    return int(path.stem)


@torch.no_grad()
def put(weights: Weights, values: Weights) -> None:
    for name, value in values.items():
        weights[name].copy_(value)


def drawn_from(count: int, files: int, seed: int) -> Sequence[int]:
    """Which of the iterates each of `count` completions is drawn from: each alike, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(files, (count,), generator=generator).tolist()
