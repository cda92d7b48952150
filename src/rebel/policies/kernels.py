"""One denoising step as a Gaussian: p(x_{t-1} | x_t, prompt) for the schedulers of diffusers that have noise.

With D dimensions, mean mu and standard deviation sigma (a number: it does not depend on the model),

    log p(x_{t-1} | x_t) = -|x_{t-1} - mu|^2 / (2 sigma^2) - D (log sigma + log(2 pi) / 2)

in nats, a sum over the dimensions. Code that takes their mean instead (that of DDPO, of Flow-GRPO and of the REBEL
paper for images) has log-probabilities smaller by D: its eta is ours divided by D, its beta ours times D. A step whose
sigma is 0 is a function of x_t; it has no density, and no column in log_prob.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from jaxtyping import Float
from torch import Tensor

from rebel.errors import RebelError

LEAST_STD = 1e-3
"""Noise below this is none: latents in bf16 are rounded by more, and a density that narrow measures the rounding."""

KINDS = "DDIM, LCM, flow matching by Euler steps (FlowMatchEulerDiscreteScheduler), or one that DDIM can stand in for"


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """p(x_{t-1} | x_t): means of N images, one standard deviation, and the clean images that the model now expects."""

    mean: Float[Tensor, "N ..."]
    std: float
    clean: Float[Tensor, "N ..."]

    def log_prob(self, following: Float[Tensor, "N ..."]) -> Float[Tensor, " N"]:
        """log p(x_{t-1} | x_t) in nats, summed over all dimensions in fp64: sums of many thousand nats are compared."""
        deviation = ((following.to(self.mean) - self.mean) / self.std).flatten(1)
        constant = deviation.shape[1] * (math.log(self.std) + math.log(2 * math.pi) / 2)
        return -deviation.square().sum(dim=1, dtype=torch.float64) / 2 - constant

    def divergence(self, other: Gaussian) -> Float[Tensor, " N"]:
        """KL in nats to another mean with the same standard deviation."""
        return ((self.mean - other.mean) / self.std).flatten(1).square().sum(dim=1, dtype=torch.float64) / 2


Std = Callable[[Any, int, float], float]
"""sigma of a step of the scheduler (by its number in the order of denoising) at a noise level."""

Mean = Callable[[Any, int, float, Tensor, Tensor], tuple[Tensor, Tensor]]
"""mu and the expected clean image of a step, from its noise level, the model's output and x_t."""


@dataclass(frozen=True, slots=True)
class Noise:
    """The kernel of a scheduler at a noise level; no step that has noise has less of it than `floor`."""

    std: Std
    mean: Mean
    level: float
    floor: float = 0.0

    def std_of(self, scheduler: Any, step: int) -> float:
        """sigma of that step; 0 where it has none."""
        std = max(self.std(scheduler, step, self.level), self.floor)
        return std if std >= LEAST_STD else 0.0

    def noisy(self, scheduler: Any) -> list[int]:
        """The steps that have noise, which are the columns of log_prob."""
        return [step for step in range(len(scheduler.timesteps)) if self.std_of(scheduler, step)]

    def __call__(self, scheduler: Any, step: int, output: Tensor, x: Tensor) -> Gaussian:
        """The Gaussian of a step, in at least fp32 whatever the precision of the model."""
        mean, clean = self.mean(scheduler, step, self.level, wide(output), wide(x))
        return Gaussian(mean, self.std_of(scheduler, step), clean)


def noise_of(scheduler: Any, level: float | None = None, floor: float = 0.0) -> Noise:
    """The noise of a scheduler; its level is DDIM's eta (1 if unset) or the SDE's a of flow matching (0.7)."""
    if isinstance(scheduler, LCMScheduler):
        if level is not None:
            raise RebelError("--noise_level: the noise of an LCMScheduler is part of the method; leave it out")
        return Noise(lcm_std, lcm_mean, 1.0, floor)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Noise(flow_std, flow_mean, 0.7 if level is None else level, floor)
    if isinstance(scheduler, DDIMScheduler):
        return Noise(ddim_std, ddim_mean, 1.0 if level is None else level, floor)
    raise RebelError(f"{type(scheduler).__name__} has no noise that rebel knows: use {KINDS}")


def with_noise(scheduler: Any) -> Any:
    """The scheduler itself if it can have noise, else DDIM over the same diffusion where diffusers says it is fit."""
    if isinstance(scheduler, DDIMScheduler | LCMScheduler | FlowMatchEulerDiscreteScheduler):
        check(scheduler)
        return scheduler
    config = scheduler.config
    flow = config.get("use_flow_sigmas") or str(config.get("prediction_type", "")).startswith("flow")
    if flow or not any(issubclass(kind, DDIMScheduler) for kind in getattr(scheduler, "compatibles", ())):
        raise RebelError(
            f"the pipeline's {type(scheduler).__name__} is an ordinary differential equation or takes no single steps: "
            f"without noise a path has no probability. Give a pipeline with {KINDS}"
        )
    # DDIM would clip by default, which latents must not be
    found: Any = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    check(found)
    return found


def check(scheduler: Any) -> None:
    for name in ("thresholding", "invert_sigmas"):
        if scheduler.config.get(name):
            raise RebelError(
                f"the pipeline's {type(scheduler).__name__} has {name}, which rebel does not know: turn it off"
            )


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- DDIM (arXiv 2010.02502, equations 12 and 16) -------------------------------------------------------------------


def alphas(scheduler: Any, step: int) -> tuple[float, float]:
    """The cumulative alphas of this step and of the one that really follows, whatever the spacing of the time steps."""
    now, later = scheduler.timesteps[step], scheduler.timesteps[step + 1 : step + 2]
    following = scheduler.alphas_cumprod[int(later[0])] if len(later) else scheduler.final_alpha_cumprod
    return float(scheduler.alphas_cumprod[int(now)]), float(following)


def ddim_std(scheduler: Any, step: int, level: float) -> float:
    now, following = alphas(scheduler, step)
    return level * math.sqrt((1 - following) / (1 - now) * (1 - now / following))


def ddim_mean(scheduler: Any, step: int, level: float, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    now, following = alphas(scheduler, step)
    clean, noise = predicted(scheduler, now, output, x)
    direction = math.sqrt(max(0.0, 1 - following - ddim_std(scheduler, step, level) ** 2))
    return math.sqrt(following) * clean + direction * noise, clean


def predicted(scheduler: Any, alpha: float, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that a model's output stands for."""
    signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        clean, noise = (x - spread * output) / signal, output
    elif kind == "sample":
        clean, noise = output, (x - signal * output) / spread
    elif kind == "v_prediction":
        clean, noise = signal * x - spread * output, signal * output + spread * x
    else:
        raise RebelError(f"the pipeline's model predicts {kind!r}; rebel knows epsilon, sample and v_prediction")
    if scheduler.config.clip_sample:
        bound = scheduler.config.clip_sample_range
        clean = clean.clamp(-bound, bound)
    return clean, noise


# -- latent consistency models (arXiv 2310.04378) -------------------------------------------------------------------


def lcm_std(scheduler: Any, step: int, level: float) -> float:
    last = step + 1 == len(scheduler.timesteps)
    return 0.0 if last else math.sqrt(1 - alphas(scheduler, step)[1])


def lcm_mean(scheduler: Any, step: int, level: float, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    now, following = alphas(scheduler, step)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(int(scheduler.timesteps[step]))
    clean = out * predicted(scheduler, now, output, x)[0] + skip * x
    last = step + 1 == len(scheduler.timesteps)
    return (clean if last else math.sqrt(following) * clean), clean


# -- flow matching as a stochastic differential equation (Flow-GRPO, arXiv 2505.05470, equations 8 and 9) -----------


def flow_variance(scheduler: Any, step: int, level: float) -> float:
    """sigma_t^2 = a^2 t / (1 - t); at t = 1, where that is infinite, with the next t below the line.

    0 for the last step, to t = 0: no later step would take its noise out of the image again.
    """
    now, following = (float(t) for t in scheduler.sigmas[step : step + 2])
    below = float(scheduler.sigmas[1]) if now >= 1 else now
    return level**2 * now / (1 - below) if following > 0 else 0.0


def flow_std(scheduler: Any, step: int, level: float) -> float:
    now, following = (float(t) for t in scheduler.sigmas[step : step + 2])
    return math.sqrt(flow_variance(scheduler, step, level) * (now - following))


def flow_mean(scheduler: Any, step: int, level: float, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    now, following = (float(t) for t in scheduler.sigmas[step : step + 2])
    drift = flow_variance(scheduler, step, level) / (2 * now)
    way = following - now
    clean = x - now * output
    return x + way * (output + drift * (x + (1 - now) * output)), clean
