"""The mixture of a run's iterates: each completion is drawn from one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.data import seed_of
from rebel.evaluate import LogProbs
from rebel.iterates import Iterates, drawn_from
from rebel.types import Completion, Prompt, Rollout, Sampler


@dataclass(frozen=True)
class Mixture:
    """Draws each completion from one of the stored iterates, chosen alike by the seed; `sampler` draws from one policy.

    As long as nothing is stored it draws from the policy as it is. At most `batch` completions at once.
    """

    sampler: Sampler
    iterates: Iterates
    batch: int = 64

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout]:
        """The groups of `prompts`, in order. The same prompts, seed and iterates give the same completions."""
        files = self.iterates.stored()
        if not files:
            yield from self.sampler(prompts, group_size, seed)
            return
        chosen = drawn_from(len(prompts) * group_size, len(files), seed)
        drawn: dict[int, Completion] = {}
        for number, file in enumerate(files):
            places = [place for place, which in enumerate(chosen) if which == number]
            with self.iterates.loaded(file):
                self.sampler.refresh()
                for start in range(0, len(places), self.batch):
                    some = places[start : start + self.batch]
                    asked = [prompts[place // group_size] for place in some]
                    rollouts = self.sampler(asked, 1, seed_of(seed, number, start))
                    drawn.update(zip(some, (rollout.completions[0] for rollout in rollouts), strict=True))
        for row, prompt in enumerate(prompts):
            yield Rollout(prompt, tuple(drawn[row * group_size + k] for k in range(group_size)))

    def refresh(self) -> None:
        self.sampler.refresh()

    def close(self) -> None:
        self.sampler.close()

    def scored(self, score: LogProbs) -> LogProbs:
        """log of the mixture's probability of whole completions; `score` gives that of the policy as it is."""

        def of_mixture(traces: Sequence[Any]) -> Float[Tensor, " N"]:
            rows = []
            for file in self.iterates.stored():
                with self.iterates.loaded(file):
                    rows.append(score(traces))
            return torch.stack(rows).logsumexp(dim=0) - math.log(len(rows)) if rows else score(traces)

        return of_mixture
