"""A small diffusion model of real handwritten digits: an ordinary pipeline of diffusers. Its latents are pixels."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rebel.errors import RebelError

SIDE, DIGITS = 8, 10
PIXELS = SIDE * SIDE


class Block(nn.Module):
    """A residual layer that is told the noise level and the digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.told = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, hidden: Float[Tensor, "N width"], told: Float[Tensor, "N width"]) -> Float[Tensor, "N width"]:
        return hidden + self.outer(nn.functional.silu(self.inner(self.norm(hidden)) + self.told(told)))


class Denoiser(ModelMixin, ConfigMixin):
    """The noise in a picture of a digit, from the picture, the timestep and the digit that it is to show."""

    @register_to_config
    def __init__(self, width: int = 192, layers: int = 3, waves: int = 64) -> None:
        super().__init__()
        self.picture = nn.Linear(PIXELS, width)
        self.digit = nn.Embedding(DIGITS, width)
        self.time = nn.Sequential(nn.Linear(waves, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.noise = nn.Linear(width, PIXELS)

    def forward(
        self, sample: Float[Tensor, "N 1 8 8"], timestep: Int[Tensor, " N"], digit: Int[Tensor, " N"]
    ) -> Float[Tensor, "N 1 8 8"]:
        time = get_timestep_embedding(timestep, self.config["waves"]).to(sample.dtype)
        told = nn.functional.silu(self.time(time) + self.digit(digit))
        hidden = self.picture(sample.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, told)
        return sample + self.noise(nn.functional.silu(hidden)).view_as(sample)  # nearly all noise at first


class DigitsPipeline(DiffusionPipeline):
    """Draws the digit that a prompt names, such as `a handwritten 7`, in `scale` times 8 x 8 grey pixels."""

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser: Denoiser, scheduler: DDIMScheduler, scale: int = 4) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(scale=scale)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 10,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "N 1 8 8"] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        digits = [digit_of(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        told = torch.tensor(digits, device=self.device)
        shape = (len(digits), 1, SIDE, SIDE)
        now = randn_tensor(shape, generator, self.device, self.denoiser.dtype) if latents is None else latents
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        options = {"eta": eta, "generator": generator}  # of those, as elsewhere in diffusers, what the scheduler takes
        taken = inspect.signature(self.scheduler.step).parameters
        more: Any = {name: value for name, value in options.items() if name in taken}
        for step in self.scheduler.timesteps:
            noise = self.denoiser(now, step.expand(len(digits)), told)
            now = self.scheduler.step(noise, step, now, return_dict=False, **more)[0]
        images: Any = now if output_type == "latent" else self.pictures(now)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def pictures(self, latents: Float[Tensor, "N 1 8 8"]) -> list[Image.Image]:
        """Grey pictures of pixels from -1, no ink, to 1."""
        grey = ((latents[:, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        size = (SIDE * self.config["scale"],) * 2
        return [Image.fromarray(each).resize(size, Image.Resampling.NEAREST) for each in grey.cpu().numpy()]


def digit_of(prompt: str) -> int:
    """The digit that a prompt names."""
    found = re.findall(r"\d", prompt)
    if len(found) != 1:
        raise RebelError(f"the prompt {prompt!r} names {len(found)} digits; the model draws one: a handwritten 7")
    return int(found[0])


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is taught. `shuffled` is the share of pictures that come with a random label."""

    width: int = 192
    layers: int = 3
    shuffled: float = 0.5
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 2e-3
    memory: float = 0.995


def taught(pictures: Float[Tensor, "N 1 8 8"], labels: Int[Tensor, " N"], recipe: Recipe, seed: int) -> DigitsPipeline:
    """A pipeline that draws digits well, and mostly not the one it was asked for: its labels were often wrong."""
    scheduler = DDIMScheduler(
        beta_schedule="linear", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser = Denoiser(recipe.width, recipe.layers)
    dice = torch.Generator().manual_seed(seed)
    teach(denoiser, scheduler, pictures, mixed_up(labels, recipe.shuffled, dice), recipe, dice)
    return DigitsPipeline(denoiser.eval(), scheduler)


def mixed_up(labels: Int[Tensor, " N"], share: float, dice: torch.Generator) -> Int[Tensor, " N"]:
    """The labels with that share of them dealt out anew among themselves."""
    chosen = torch.randperm(len(labels), generator=dice)[: round(share * len(labels))]
    dealt = labels.clone()
    dealt[chosen] = labels[chosen[torch.randperm(len(chosen), generator=dice)]]
    return dealt


def teach(
    denoiser: Denoiser,
    scheduler: DDIMScheduler,
    pictures: Float[Tensor, "N 1 8 8"],
    labels: Int[Tensor, " N"],
    recipe: Recipe,
    dice: torch.Generator,
) -> None:
    """Noise prediction; the model is left with the running average of its weights."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(recipe.memory))
    for _ in range(recipe.steps):
        rows = torch.randint(len(pictures), (recipe.batch,), generator=dice)
        times = torch.randint(scheduler.config["num_train_timesteps"], (recipe.batch,), generator=dice)
        noise = torch.randn(recipe.batch, *pictures.shape[1:], generator=dice)
        noisy = scheduler.add_noise(pictures[rows], noise, cast(Any, times))
        nn.functional.mse_loss(denoiser(noisy, times, labels[rows]), noise).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(denoiser)
    denoiser.load_state_dict(average.module.state_dict())


def as_latents(ink: Any) -> Float[Tensor, "N 1 8 8"]:
    """Ink from 0 to 1 at 64 places as pixels from -1 to 1."""
    return torch.as_tensor(ink, dtype=torch.float32).view(-1, 1, SIDE, SIDE) * 2 - 1
