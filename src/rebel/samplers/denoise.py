"""Images drawn by the pipeline that is trained, in this process, with the paths by which they came about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.errors import RebelError
from rebel.policies.diffusion import Diffusion
from rebel.policies.kernels import Gaussian
from rebel.policies.path import watched
from rebel.seeds import seed_of
from rebel.types import Completion, LatentTrace, Prompt, Rollout

FIRST, LATER = range(2)
"""Streams of random numbers: of x_T, and of the noise of the steps."""


@dataclass(frozen=True)
class Denoise:
    """Draws images from the policy, `batch` at a time; every image has random numbers of its own.

    With `same_noise` all images of a group begin at the same x_T. An image that the pipeline's safety checker blacks
    out counts as unfinished.
    """

    policy: Diffusion
    batch: int
    same_noise: bool = False
    precision: Callable[[], AbstractContextManager] = nullcontext

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout[LatentTrace]]:
        """The groups of `prompts`, in order. The same prompts and seed give the same images, whatever the batch."""
        wanted = [(place, k) for place in range(len(prompts)) for k in range(group_size)]
        texts = [text_of(prompt) for prompt in prompts]
        drawn: list[Completion[LatentTrace]] = []
        for start in range(0, len(wanted), self.batch):
            batch = wanted[start : start + self.batch]
            first = [seed_of(seed, FIRST, place, 0 if self.same_noise else k) for place, k in batch]
            later = [seed_of(seed, LATER, place, k) for place, k in batch]
            drawn += self.draw([texts[place] for place, _ in batch], first, later)
            while len(drawn) >= group_size:
                yield Rollout(prompts[(start + len(batch) - len(drawn)) // group_size], tuple(drawn[:group_size]))
                del drawn[:group_size]

    def refresh(self) -> None:
        """Nothing to do: it samples from the weights that are trained."""

    def close(self) -> None:
        """Nothing to do: it holds nothing."""

    def draw(self, prompts: list[str], first: list[int], later: list[int]) -> list[Completion[LatentTrace]]:
        """One image of each prompt, from the seeds of its x_T and of its steps."""
        scorer, pipeline = self.policy.bare, self.policy.pipeline
        call: Any = pipeline  # whose class has a call, and not that of all pipelines
        count = len(prompts)
        fill = max(0, scorer.batch - count)
        diary = Diary(generators([*later, *later[:1] * fill]))
        full = [*prompts, *prompts[:1] * fill]
        starts = generators([*first, *first[:1] * fill])
        with torch.no_grad(), self.precision(), watched(pipeline, scorer.noise, diary.visit):
            output = scorer.call(call, full, generator=starts, output_type="pil", return_dict=True)
        blacked = getattr(output, "nsfw_content_detected", None) or [False] * count
        pairs = zip(output.images[:count], diary.traces(prompts), blacked, strict=False)
        return [Completion(image, trace, finished=not black) for image, trace, black in pairs]


@dataclass
class Diary:
    """Draws the steps of a pipeline and notes them down."""

    generators: list[torch.Generator]
    latents: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)

    def visit(self, step: int, x: Tensor, given: Gaussian) -> Tensor:
        """x_{t-1}, in the precision in which the model is to see it and in which it is scored."""
        if not self.latents:
            self.latents.append(x)
        following = (given.mean + given.std * self.noise(given.mean) if given.std else given.mean).to(x.dtype)
        if given.std:
            self.logp.append(given.log_prob(following))
        self.latents.append(following)
        return following

    def noise(self, like: Tensor) -> Float[Tensor, "N ..."]:
        """Drawn on the CPU, so that a seed means the same on every device."""
        rows = [torch.randn(like.shape[1:], generator=one, dtype=like.dtype) for one in self.generators]
        return torch.stack(rows).to(like.device)

    def traces(self, prompts: Sequence[str]) -> list[LatentTrace]:
        paths = torch.stack(self.latents, dim=1).cpu()
        if not self.logp:
            raise RebelError(
                "no denoising step has noise, so that a path has no probability: use more --denoising_steps, "
                "and a --noise_level above 0"
            )
        logp = torch.stack(self.logp, dim=1).cpu()
        return [LatentTrace(prompt, paths[k], logp[k]) for k, prompt in enumerate(prompts)]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def text_of(prompt: Prompt) -> str:
    """The prompt as text: pipelines of images know no chats."""
    content: Any = prompt.content
    if not isinstance(content, str):
        raise RebelError("a prompt of an image is plain text, and this one is chat messages: give a column of text")
    return content
