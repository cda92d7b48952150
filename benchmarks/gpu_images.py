"""Pipelines of real sizes with random weights on a GPU: bf16 replay, memory against denoising steps, images a second.

    PYTHONPATH=src python benchmarks/gpu_images.py            # on CUDA, about two minutes
    PYTHONPATH=src python benchmarks/gpu_images.py --tiny     # the same on the CPU with tiny models

Needs torch, diffusers, transformers, peft and pillow, of rebel only the policy and its sampler, and no download:
denoisers and VAE have the sizes of SD 1.5, SDXL and SD 3 Medium, text encoders one layer of the right width. bf16
weights, LoRA of rank 16 in fp32 on every linear layer, classifier-free guidance. Writes results/gpu_images.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    import jaxtyping  # noqa: F401
except ImportError:  # only annotations use it

    class _Any:
        def __class_getitem__(cls, item: Any) -> Any:
            return Any

    sys.modules["jaxtyping"] = types.ModuleType("jaxtyping")
    vars(sys.modules["jaxtyping"]).update({name: _Any for name in ("Float", "Int", "Bool")})

import diffusers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rebel.credit import Known
from rebel.policies.diffusion import Diffusion, diffusion
from rebel.samplers.denoise import Denoise
from rebel.types import LatentTrace, Prompt

RESULT = Path(__file__).parent / "results" / "gpu_images.json"
STEPS = (5, 10, 20, 40)
WHOLE_GRAPH = (5, 10)
"""Denoising steps for the memory of the graph of all steps, which is what step by step avoids."""
TRAINED_STEPS = 10
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "cat", "dog", "red", "house"]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=77, **marks)


def clip(width: int, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=9,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=width // 32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def vae(tiny: bool, channels: int = 4) -> AutoencoderKL:
    widths = (8, 8) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if tiny else 2,
        latent_channels=channels,
        norm_num_groups=4 if tiny else 32,
        shift_factor=0.0,
    )


def sd15(tiny: bool) -> Any:
    """Stable Diffusion 1.5: 860 million weights."""
    small: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    width = 32 if tiny else 768
    unet = UNet2DConditionModel(cross_attention_dim=width, sample_size=8 if tiny else 64, **(small if tiny else {}))
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = (vae(tiny), clip(width), tokenizer(), unet, scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def sdxl(tiny: bool) -> Any:
    """Stable Diffusion XL: 2.6 billion weights."""
    first, second = (32, 32) if tiny else (768, 1280)
    size: dict[str, Any] = {
        "block_out_channels": (8, 16, 16) if tiny else (320, 640, 1280),
        "attention_head_dim": (2, 4, 4) if tiny else (5, 10, 20),
        "transformer_layers_per_block": (1, 1, 1) if tiny else (1, 2, 10),
        "norm_num_groups": 4 if tiny else 32,
        "addition_time_embed_dim": 8 if tiny else 256,
    }
    unet = UNet2DConditionModel(
        sample_size=8 if tiny else 128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=first + second,
        use_linear_projection=True,
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=second + 6 * size["addition_time_embed_dim"],
        **size,
    )
    encoders = (clip(first), clip(second, projection=True))
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    parts = (vae(tiny), *encoders, tokenizer(), tokenizer(), unet, scheduler)
    return StableDiffusionXLPipeline(*parts, add_watermarker=False)


def sd3(tiny: bool) -> Any:
    """Stable Diffusion 3 Medium: 2 billion weights."""
    first, second, third = (32, 32, 64) if tiny else (768, 1280, 4096)
    heads = 4 if tiny else 24
    transformer = SD3Transformer2DModel(
        sample_size=8 if tiny else 64,
        in_channels=4 if tiny else 16,
        out_channels=4 if tiny else 16,
        num_layers=2 if tiny else 24,
        num_attention_heads=heads,
        attention_head_dim=8 if tiny else 64,
        caption_projection_dim=heads * (8 if tiny else 64),
        joint_attention_dim=third,
        pooled_projection_dim=first + second,
        pos_embed_max_size=8 if tiny else 192,
    )
    shape: dict[str, Any] = {"d_model": third, "d_ff": third, "d_kv": 64, "num_heads": third // 64}
    t5 = T5EncoderModel(T5Config(vocab_size=9, num_layers=1, **shape))
    encoders = (clip(first, True), tokenizer(), clip(second, True), tokenizer(), t5, tokenizer())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, vae(tiny, 4 if tiny else 16), *encoders)


MODELS: dict[str, tuple[Callable[[bool], Any], int, int, tuple[int, int, int]]] = {
    "SD 1.5, 512 px": (sd15, 512, 4, (4, 64, 64)),
    "SDXL, 1024 px": (sdxl, 1024, 1, (4, 128, 128)),
    "SD 3 Medium, 512 px": (sd3, 512, 2, (16, 64, 64)),
}
"""Pipeline, pixels, images at once and the shape of their latents."""


def loaded(make: Callable[[bool], Any], tiny: bool, device: str) -> Any:
    """The pipeline on its device, bf16 with an adapter in fp32 that has moved a little from where it began."""
    torch.manual_seed(0)
    with torch.device(device):
        pipeline = make(tiny)
    pipeline.to(device, torch.bfloat16)
    denoiser = denoiser_in(pipeline).requires_grad_(False)
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    denoiser.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=linear))
    for name, weight in denoiser.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float() + 1e-3 * torch.randn_like(weight.data.float())
    return pipeline


def denoiser_in(pipeline: Any) -> Any:
    return pipeline.components.get("unet") or pipeline.components["transformer"]


def policy_of(pipeline: Any, steps: int, pixels: int, batch: int) -> Diffusion:
    return diffusion(pipeline, steps, image_size=pixels, batch=batch)


def paths(policy: Diffusion, steps: int, count: int, shape: tuple[int, int, int]) -> list[LatentTrace]:
    """Paths of noise: as much work as drawn ones."""
    source = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, steps + 1, *shape, generator=source).bfloat16()
    return [LatentTrace("a cat", path) for path in drawn]


def replay_gap(pipeline: Any, pixels: int, batch: int) -> dict[str, float]:
    """Largest |replayed - drawn| log p of a step in nats: the same batch, and one image of it in other batches."""
    policy = policy_of(pipeline, TRAINED_STEPS, pixels, batch)
    rollouts = Denoise(policy, batch)([Prompt("a cat"), Prompt("a red house")], max(1, batch // 2), seed=3)
    traces = [trace for rollout in rollouts for trace in rollout.traces][:batch]
    drawn = torch.stack([trace.drawn_logp for trace in traces if trace.drawn_logp is not None])
    loose = policy_of(pipeline, TRAINED_STEPS, pixels, 0)
    with torch.no_grad():
        same = (policy.log_prob(traces).cpu() - drawn).abs().max()
        part = (policy.log_prob(traces[:1]).cpu() - drawn[:1]).abs().max()
        other = (loose.log_prob(traces[:1]).cpu() - drawn[:1]).abs().max()
    return {
        "same batch": float(same),
        "one image, filled up": float(part),
        "one image, alone": float(other),
        "largest log p": float(drawn.abs().max()),
    }


def memory(policy: Diffusion, work: Callable[[], Any]) -> dict[str, Any]:
    """Peak GPU memory of some work in GiB with what is there before it, and its seconds."""
    for weight in policy.trained:
        weight.grad = None
    before = settle(reset=True)
    began = time.perf_counter()
    try:
        work()
    except torch.cuda.OutOfMemoryError:
        return {"peak": None, "before": before, "seconds": None}
    peak = settle()
    return {"peak": peak, "before": before, "seconds": time.perf_counter() - began}


def settle(reset: bool = False) -> float:
    """GiB allocated at most since the last reset; with `reset` those allocated now."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    if reset:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    return torch.cuda.max_memory_allocated() / 2**30


def stepwise(pipeline: Any, steps: int, pixels: int, batch: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The update of one micro-batch, one denoising step at a time."""
    policy = policy_of(pipeline, steps, pixels, batch)
    traces = paths(policy, steps, batch, shape)
    known = Known(torch.full((batch,), 1e-3, dtype=torch.float64))
    return memory(policy, lambda: policy.backward(traces, known, lambda loss: loss.backward()))


def whole_graph(pipeline: Any, steps: int, pixels: int, batch: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The same with the graph of all steps at once."""
    policy = policy_of(pipeline, steps, pixels, batch)
    traces = paths(policy, steps, batch, shape)
    return memory(policy, lambda: (1e-3 * policy.log_prob(traces)).sum().backward())


def speed(pipeline: Any, pixels: int, batch: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Images a second: drawn and decoded, scored, and back-propagated."""
    policy = policy_of(pipeline, TRAINED_STEPS, pixels, batch)
    traces = paths(policy, TRAINED_STEPS, batch, shape)
    known = Known(torch.full((batch,), 1e-3, dtype=torch.float64))

    @torch.no_grad()
    def score() -> Any:
        return policy.log_prob(traces)

    work: dict[str, Callable[[], Any]] = {
        "drawn": lambda: list(Denoise(policy, batch)([Prompt("a cat")], batch, seed=4)),
        "scored": score,
        "back-propagated": lambda: policy.backward(traces, known, lambda loss: loss.backward()),
    }
    return {name: batch / seconds(do) for name, do in work.items()}


def seconds(work: Callable[[], Any]) -> float:
    """Of the second of two runs."""
    for _ in range(2):
        settle()
        began = time.perf_counter()
        work()
        settle()
        taken = time.perf_counter() - began
    return taken


def measured(name: str, tiny: bool, device: str) -> dict[str, Any]:
    make, pixels, batch, shape = MODELS[name]
    if tiny:
        pipeline = loaded(make, tiny, device)
        pixels, batch = 8 * pipeline.vae_scale_factor, 2
        shape = (4, 8, 8)
    else:
        pipeline = loaded(make, tiny, device)
    row: dict[str, Any] = {"model": name, "pixels": pixels, "images at once": batch}
    row["weights"] = sum(weight.numel() for weight in denoiser_in(pipeline).parameters())
    row["replay, nats"] = replay_gap(pipeline, pixels, batch)
    row["images a second"] = speed(pipeline, pixels, batch, shape)
    row["step by step"] = {steps: stepwise(pipeline, steps, pixels, batch, shape) for steps in STEPS}
    row["whole graph"] = {steps: whole_graph(pipeline, steps, pixels, batch, shape) for steps in WHOLE_GRAPH}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for the eye."""
    lines = [
        "| model | weights | replay gap, same batch / one filled up / one alone | drawn, scored, back-propagated /s | "
        + " | ".join(f"GiB, {steps} steps" for steps in STEPS)
        + " | "
        + " | ".join(f"whole graph, {steps}" for steps in WHOLE_GRAPH)
        + " |",
        "| --- " * (4 + len(STEPS) + len(WHOLE_GRAPH)) + "|",
    ]
    for row in rows:
        gap, rate = row["replay, nats"], row["images a second"]
        gaps = " / ".join(f"{gap[name]:.2g}" for name in ("same batch", "one image, filled up", "one image, alone"))
        rates = ", ".join(f"{value:.2f}" for value in rate.values())
        peaks = [of["peak"] for name in ("step by step", "whole graph") for of in row[name].values()]
        shown = " | ".join("out of memory" if peak is None else f"{peak:.2f}" for peak in peaks)
        lines.append(
            f"| {row['model']}, {row['images at once']} at once | {row['weights'] / 1e9:.2f} G | {gaps} | {rates} "
            f"| {shown} |"
        )
    return "\n".join(lines)


def commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to test this script")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    diffusers.utils.logging.set_verbosity_error()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit(),
        "denoising steps of replay and speed": TRAINED_STEPS,
        "rows": [],
    }
    began = time.perf_counter()
    for name in arguments.models:
        result["rows"].append(measured(name, arguments.tiny, device))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")  # what there is, should a later one fail
        settle(reset=True)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
