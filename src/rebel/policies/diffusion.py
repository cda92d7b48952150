"""A diffusion or flow pipeline as a policy: the denoising paths that it drew, re-scored step by step.

The pipeline runs as it is, guidance and conditions included, with a scheduler in its slot that returns the recorded
x_{t-1} (see `path`). So every step has a graph of its own, which is back-propagated and let go before the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rebel.credit import Known
from rebel.errors import RebelError
from rebel.policies.kernels import Gaussian, Noise, noise_of, with_noise
from rebel.policies.path import Conditions, PathEnd, check_options, differentiable, watched
from rebel.policies.wrapping import unwrapped
from rebel.types import LatentTrace, LogProb

NOT_DENOISERS = ("vae", "text_encoder", "image_encoder", "safety_checker", "feature_extractor")
"""Beginnings of the names of models in a pipeline that do not denoise."""

SETTINGS = {"height": "image_size", "width": "image_size", "num_inference_steps": "denoising_steps"}
"""Names of options of a pipeline's call among the settings, where they differ."""

Step = Callable[[int, Gaussian, Float[Tensor, "N ..."], bool], None]
"""Told of each step that has noise: its column, its Gaussian, the x_{t-1} that was drawn, whether it is the last."""


class Scorer(nn.Module):
    """The module whose forward is log_prob, so that the hooks of DDP fire for it.

    `batch`, if above 0, is the number of images that always go through the model together: in bf16 a result depends on
    how many there are, and so log pi_theta would differ from log pi_t by more than was learnt.
    """

    def __init__(self, pipeline: DiffusionPipeline, noise: Noise, options: Mapping[str, Any], batch: int = 0) -> None:
        super().__init__()
        self.denoiser = denoiser_of(pipeline)[1]
        self.pipeline, self.noise, self.options, self.batch = pipeline, noise, dict(options), batch
        self.conditions = Conditions(pipeline)

    def forward(
        self,
        traces: Sequence[LatentTrace],
        weights: Float[Tensor, "N *C"] | None = None,
        backward: Callable[[Tensor], None] | None = None,
    ) -> tuple[Float[Tensor, "N S"], Float[Tensor, ""] | None]:
        """log p of every step that has noise, in nats; with weights c also sum(c * log p) of the last of these steps.

        That of every step before it is back-propagated on the way. So the caller's backward pass is the last one, in
        which DDP exchanges what all of them added up.
        """
        found: list[Tensor] = []
        rest: list[Tensor] = []

        def note(column: int, given: Gaussian, following: Tensor, last: bool) -> None:
            logp = given.log_prob(following)[: len(traces)]
            found.append(logp if weights is None else logp.detach())
            if weights is None or backward is None:
                return
            pull = ((weights if weights.ndim == 1 else weights[:, column]).to(logp) * logp).sum()
            rest.append(pull) if last else backward(pull)

        self.replay(traces, note)
        return torch.stack(found, dim=1), rest[0] if rest else None

    def replay(self, traces: Sequence[LatentTrace], note: Step) -> None:
        """The pipeline once more along the paths of these traces, with gradients unless they are turned off."""
        full = [*traces, *[traces[0]] * (self.batch - len(traces))]
        self.check_length(full)
        device = next(self.denoiser.parameters()).device
        path = torch.stack([trace.latents for trace in full], dim=1).to(device)
        columns: dict[int, int] = {}

        def visit(step: int, x: Tensor, given: Gaussian) -> Tensor:
            if not columns:
                columns.update({k: column for column, k in enumerate(self.noise.noisy(self.pipeline.scheduler))})
            if step in columns:
                last = columns[step] + 1 == len(columns)
                note(columns[step], given, path[step + 1], last)
                if last:
                    raise PathEnd
            return path[step + 1]

        with watched(self.pipeline, self.noise, visit), suppress(PathEnd):
            self.call(differentiable(self.pipeline), [trace.prompt for trace in full], latents=path[0])

    def call(self, call: Callable[..., Any], prompts: Sequence[str], **more: Any) -> Any:
        """The pipeline's call for these prompts, of latents unless told otherwise."""
        return call(**self.conditions(prompts), **self.options, **{"output_type": "latent", **more})

    def check_length(self, traces: Sequence[LatentTrace]) -> None:
        steps = self.options["num_inference_steps"]
        if any(len(trace) != steps for trace in traces):
            raise RebelError(
                f"--denoising_steps {steps}: a path to re-score has {len(traces[0])} steps; both have to be the same"
            )


@dataclass(frozen=True)
class Diffusion:
    """A pipeline of diffusers whose denoiser is trained, whole or by an adapter in it."""

    scorer: nn.Module

    @property
    def bare(self) -> Scorer:
        """The scorer without what wraps it for distribution."""
        return unwrapped(self.scorer, Scorer)

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.bare.pipeline

    @property
    def denoiser(self) -> nn.Module:
        return self.bare.denoiser

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that are trained."""
        return [weight for weight in self.denoiser.parameters() if weight.requires_grad]

    def log_prob(self, traces: Sequence[LatentTrace]) -> Float[Tensor, "N S"]:
        """log p of every denoising step that has noise, in nats. Independent of the batch, in fp32."""
        return self.scorer(traces)[0]

    def backward(
        self,
        traces: Sequence[LatentTrace],
        weigh: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], None],
    ) -> Float[Tensor, "N S"]:
        """Back-propagate sum(c * log_prob) one step at a time: memory does not depend on the number of steps.

        c has to be known before the first step: unless it is, the path is replayed without gradient first.
        """
        if isinstance(weigh, Known):
            weights = weigh.columns
        else:
            with torch.no_grad():
                weights = weigh(self.bare(traces)[0])
        logp, last = self.scorer(traces, weights, backward)
        backward(last)
        return logp

    @torch.no_grad()
    def divergence(self, traces: Sequence[LatentTrace], before: Sequence[Tensor]) -> Float[Tensor, "N S"]:
        """KL(now || before) in nats of every step, |mu - mu_before|^2 / (2 sigma^2), at the x_t of the traces."""
        now = self.gaussians(traces)
        with self.with_weights(before):
            then = self.gaussians(traces)
        found = [new.divergence(old) for new, old in zip(now, then, strict=True)]
        return torch.stack(found, dim=1)[: len(traces)]

    def gaussians(self, traces: Sequence[LatentTrace]) -> list[Gaussian]:
        """The Gaussian of every step that has noise."""
        found: list[Gaussian] = []
        self.bare.replay(traces, lambda column, given, following, last: found.append(given))
        return found

    @contextmanager
    def with_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within this context the trained parameters have these values."""
        kept = [weight.detach().clone() for weight in self.trained]
        put(self.trained, weights)
        try:
            yield
        finally:
            put(self.trained, kept)

    def cost(self, traces: Sequence[LatentTrace]) -> int:
        """Images that go through the model together."""
        return len(traces)


@torch.no_grad()
def put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def diffusion(
    pipeline: DiffusionPipeline,
    steps: int,
    noise_level: float | None = None,
    noise_floor: float = 0.0,
    guidance_scale: float | None = None,
    image_size: int | None = None,
    batch: int = 0,
) -> Diffusion:
    """A policy from a loaded pipeline, as diffusers has it or derived from its DiffusionPipeline.

    Its scheduler is replaced by DDIM if it has no noise of its own. What is to be trained has to require gradients
    already; everything else in the pipeline is frozen, and nothing drops out.
    """
    pipeline.scheduler = with_noise(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": steps}
    options |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    options |= {} if image_size is None else {"height": image_size, "width": image_size}
    check_options(pipeline, options, SETTINGS)
    check_types(pipeline)
    freeze(pipeline)
    noise = noise_of(pipeline.scheduler, noise_level, noise_floor)
    return Diffusion(Scorer(pipeline, noise, options, batch))


def freeze(pipeline: DiffusionPipeline) -> None:
    """Evaluation mode without dropout for all, and no gradients but in the denoiser."""
    denoiser = denoiser_of(pipeline)[1]
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval()
            if module is not denoiser:
                module.requires_grad_(False)
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def check_types(pipeline: DiffusionPipeline) -> None:
    """Raises RebelError where the denoiser and a text encoder have weights of different types: latents take theirs."""
    denoiser = denoiser_of(pipeline)
    for name, module in pipeline.components.items():
        if name.startswith("text_encoder") and isinstance(module, nn.Module):
            types = [next(m.parameters()).dtype for m in (denoiser[1], module)]
            if types[0] != types[1]:
                raise RebelError(
                    f"the pipeline's {denoiser[0]} has weights of {types[0]} and its {name} of {types[1]}: load all of "
                    "it with one --dtype"
                )


def denoiser_of(pipeline: DiffusionPipeline) -> tuple[str, Any]:
    """The model that denoises and its name in the pipeline: `unet`, `transformer`, or the only one it can be."""
    components: dict[str, Any] = pipeline.components
    models = {
        name: module
        for name, module in components.items()
        if isinstance(module, ModelMixin) and not name.startswith(NOT_DENOISERS)
    }
    for name in ("unet", "transformer"):
        if name in models:
            return name, models[name]
    if len(models) != 1:
        raise RebelError(
            f"a {type(pipeline).__name__} has {', '.join(models) or 'no model'} where one unet or transformer that "
            "denoises is expected"
        )
    return next(iter(models.items()))


def without_adapter(policy: Diffusion) -> LogProb:
    """log pi_ref by the same weights with the adapter off: no second model."""
    layers = [module for module in policy.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def log_prob(traces: Sequence[LatentTrace]) -> Tensor:
        for layer in layers:
            layer.enable_adapters(enabled=False)
        try:
            return policy.bare(traces)[0]
        finally:
            for layer in layers:
                layer.enable_adapters(enabled=True)

    return log_prob


def frozen_copy(policy: Diffusion) -> LogProb:
    """log pi_ref by a copy of the trained parameters as they are now."""
    initial = [weight.detach().clone() for weight in policy.trained]

    def log_prob(traces: Sequence[LatentTrace]) -> Tensor:
        with policy.with_weights(initial):
            return policy.bare(traces)[0]

    return log_prob
