"""Whether a pipeline's paths have the same log-probabilities when they are replayed as when they were drawn.

They have to before anything is learnt: the ratio of both is 1, or what is regressed is not what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from rebel.errors import RebelError
from rebel.policies.diffusion import Diffusion
from rebel.samplers.denoise import Denoise
from rebel.types import LatentTrace, Prompt

TOLERANCE = 1e-3
"""Nats by which log p of a step may differ."""


@torch.no_grad()
def check_replay(sampler: Denoise, prompts: Sequence[Prompt], seed: int = 0) -> float:
    """The largest difference in nats between a drawn and a replayed log p of a step, over one batch of images.

    Raises RebelError with the step and what differs where that is beyond TOLERANCE, and where nothing can be drawn.
    """
    asked = [prompts[k % len(prompts)] for k in range(sampler.batch)]
    try:
        traces = [trace for rollout in sampler(asked, 1, seed) for trace in rollout.traces]
    except RebelError:
        raise
    except (ValueError, TypeError) as error:  # what a pipeline says of its arguments
        said = str(error).strip().splitlines()[0]
        raise RebelError(f"the pipeline draws nothing with these settings: {said}") from error
    drawn = torch.stack([trace.drawn_logp for trace in traces if trace.drawn_logp is not None])
    replayed = replay(sampler.policy, traces, sampler.precision)
    gap = (replayed - drawn).abs()
    limit = TOLERANCE + 1e-7 * drawn.abs()
    if bool((gap <= limit).all()):
        return float(gap.max())
    image, column = divmod(int((gap - limit).nan_to_num(torch.inf).argmax()), gap.shape[1])
    again = replay(sampler.policy, traces, sampler.precision)
    raise RebelError(
        f"replaying a denoising path does not give the log-probabilities it was drawn with: step {column + 1} of "
        f"{gap.shape[1]} differs by {float(gap[image, column]):.3g} nats, of which {TOLERANCE:g} are allowed. "
        f"{reason(sampler.policy, traces, steady=torch.equal(again, replayed))}"
    )


def replay(policy: Diffusion, traces: Sequence[LatentTrace], precision: Callable[[], AbstractContextManager]) -> Tensor:
    with precision():
        return policy.bare(traces)[0].cpu()


def reason(policy: Diffusion, traces: Sequence[LatentTrace], steady: bool) -> str:
    """What differs between drawing and replaying, as far as it can be seen."""
    training = [
        name for name, module in policy.denoiser.named_modules() if module.training and not list(module.children())
    ]
    if training:
        return f"The model is in training mode ({training[0] or type(policy.denoiser).__name__}): call its eval()"
    types = {str(weight.dtype).removeprefix("torch.") for weight in frozen(policy.denoiser)}
    if len(types) > 1:
        return f"The model has weights of several types ({', '.join(sorted(types))}): load all of it with one --dtype"
    seen = str(traces[0].latents.dtype).removeprefix("torch.")
    if seen not in types:
        return f"The model's weights are {', '.join(types)} and its latents {seen}: load all of it with one --dtype"
    if not steady:
        return "Two replays differ too: the pipeline or the device computes with something random or in no fixed order"
    return "The pipeline does something else when it is given the prompt's embeddings and the first latents"


def frozen(module: nn.Module) -> list[Tensor]:
    """The floating-point parameters of a model without those of an adapter."""
    return [w for name, w in module.named_parameters() if w.is_floating_point() and "lora_" not in name]
