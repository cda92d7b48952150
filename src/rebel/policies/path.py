"""The way of a pipeline through its denoising steps, watched from the public slot `pipeline.scheduler`.

Every pipeline of diffusers calls `self.scheduler.step(output, t, x_t)` once a step, with classifier-free guidance
already in the output. Whoever stands in that slot can draw x_{t-1} and note it down, or return what was drawn before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from rebel.errors import RebelError
from rebel.policies.kernels import Gaussian, Noise

Visit = Callable[[int, Tensor, Gaussian], Tensor]
"""x_{t-1} from the number of the step, x_t and the Gaussian of the step."""


class PathEnd(Exception):
    """Ends a pipeline's loop after the last step that is of interest."""


class Watched:
    """The scheduler of a pipeline, but that `step` goes to where `visit` says, and `done` counts the steps."""

    def __init__(self, scheduler: Any, noise: Noise, visit: Visit) -> None:
        self.scheduler, self.noise, self.visit = scheduler, noise, visit
        self.done = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["scheduler"], name)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x_{t-1}, and the clean image that is now expected, as some pipelines ask for."""
        given = self.noise(self.scheduler, self.done, model_output, sample)
        following, clean = self.visit(self.done, sample, given), given.clean.to(sample.dtype)
        self.done += 1
        return SimpleNamespace(prev_sample=following, denoised=clean) if return_dict else (following, clean)


@contextmanager
def watched(pipeline: DiffusionPipeline, noise: Noise, visit: Visit) -> Iterator[None]:
    """Within this context the pipeline's steps go where `visit` says; afterwards it is as it was."""
    own = pipeline.scheduler
    pipeline.scheduler = Watched(own, noise, visit)
    try:
        yield
    finally:
        pipeline.scheduler = own


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def differentiable(pipeline: DiffusionPipeline) -> Callable[..., Any]:
    """The pipeline's own call without the torch.no_grad around it."""
    call: Any = type(pipeline).__call__
    return partial(getattr(call, "__wrapped__", call), pipeline)


def check_options(pipeline: DiffusionPipeline, options: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Raises RebelError for an option that the pipeline's call does not take; `settings` are their names to users."""
    known = parameters(type(pipeline).__call__)
    for name in options:
        if name not in known:
            raise RebelError(f"--{settings.get(name, name)}: a {type(pipeline).__name__} takes no {name}; leave it out")


class Conditions:
    """What a pipeline is to draw, as arguments of its call.

    A prompt goes through the text encoders once, alone, so that nothing depends on the batch it is in; where it is not
    clear which arguments take what `encode_prompt` returns, the text itself is passed in every call.
    """

    MOST = 1024
    """Prompts of which the embeddings are kept, in main memory."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.names = embedding_names(pipeline)
        self.known: dict[str, dict[str, Tensor]] = {}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Any]:
        if not self.names:
            return {"prompt": list(prompts)}
        found = [self.encoded(prompt) for prompt in prompts]
        device = self.pipeline._execution_device
        return {name: torch.cat([one[name] for one in found]).to(device) for name in found[0]}

    def encoded(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self.known:
            if len(self.known) >= self.MOST:
                self.known.pop(next(iter(self.known)))
            taken = parameters(type(self.pipeline).__call__)
            outputs = zip(self.names, encode(self.pipeline, [prompt]), strict=False)
            self.known[prompt] = {name: x.cpu() for name, x in outputs if x is not None and name in taken}
        return self.known[prompt]


@torch.no_grad()
def encode(pipeline: Any, prompt: list[str] | None, **embeddings: Tensor) -> Sequence[Tensor | None]:
    """What the pipeline's encode_prompt returns."""
    wanted = parameters(type(pipeline).encode_prompt)
    called = parameters(type(pipeline).__call__)
    given = {"prompt": prompt, "device": pipeline._execution_device, "num_images_per_prompt": 1}
    given |= {"do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None}
    if "max_sequence_length" in called:
        given["max_sequence_length"] = called["max_sequence_length"].default
    return pipeline.encode_prompt(**{k: v for k, v in given.items() if k in wanted}, **embeddings)


def embedding_names(pipeline: Any) -> list[str]:
    """The arguments that take what encode_prompt returns, in that order; none where that is not clear.

    They have to come back unchanged when they are given to encode_prompt itself.
    """
    if not hasattr(pipeline, "encode_prompt"):
        return []
    names = [name for name in parameters(type(pipeline).encode_prompt) if "embeds" in name]
    try:
        outputs = encode(pipeline, ["a cat"])
        longer = encode(pipeline, ["a small red cat"])
        known = {name: x for name, x in zip(names, outputs, strict=False) if x is not None}
        again = encode(pipeline, None, **known)
        same = all(torch.equal(x, y) for x, y in zip(outputs, again, strict=True) if x is not None and y is not None)
        fixed = all(x.shape == y.shape for x, y in zip(outputs, longer, strict=True) if x is not None and y is not None)
    except Exception:  # whatever a pipeline raises that is called in another way
        return []
    return names if same and fixed and known.keys() & parameters(type(pipeline).__call__).keys() else []
