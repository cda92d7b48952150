"""Small random pipelines of five families of diffusers, made on the spot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rebel.build.images import build_image_job
from rebel.build.job import Job
from rebel.build.pipeline import build_pipeline
from rebel.config import RebelConfig
from rebel.job import carry_out
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import PerCompletion
from rebel.run_folder import checkpoint_to_resume, claim_folder
from rebel.types import Prompt

diffusers.utils.logging.set_verbosity_error()
WIDTH = 32
"""Of the embeddings of a prompt."""


def tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    """Words by white space, with the special tokens and the length that a text encoder of CLIP expects."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "cat", "dog", "red", "small", "house", "on", "the"]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=length,
    )


def clip(projection: bool = False) -> Any:
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=12,
            hidden_size=WIDTH,
            intermediate_size=37,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=12, d_model=WIDTH, d_ff=37, d_kv=8, num_layers=1, num_heads=4))


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )


def unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=more.pop("cross_attention_dim", WIDTH),
        attention_head_dim=4,
        norm_num_groups=4,
        dropout=0.1,
        **more,
    )


DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion() -> DiffusionPipeline:
    scheduler = DDIMScheduler(**DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae(), clip(), tokenizer(), unet(), scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    denoiser = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    scheduler = DDIMScheduler(**DIFFUSION, clip_sample=False, timestep_spacing="trailing")
    return StableDiffusionXLPipeline(
        vae(), clip(), clip(projection=True), tokenizer(), tokenizer(), denoiser, scheduler, add_watermarker=False
    )


def latent_consistency() -> DiffusionPipeline:
    return LatentConsistencyModelPipeline(
        vae(),
        clip(),
        tokenizer(),
        unet(time_cond_proj_dim=8),
        LCMScheduler(**DIFFUSION),
        None,  # pyright: ignore
        None,  # pyright: ignore
        requires_safety_checker=False,
    )


def stable_diffusion_3() -> DiffusionPipeline:
    denoiser = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        denoiser,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(),
        clip(projection=True),
        tokenizer(),
        clip(projection=True),
        tokenizer(),
        t5(),
        tokenizer(),
    )


def flux() -> DiffusionPipeline:
    denoiser = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = FluxPipeline(scheduler, vae(), clip(), tokenizer(), t5(), tokenizer(), denoiser)
    pipeline.default_sample_size = 8
    return pipeline


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "lcm": latent_consistency,
    "sd3": stable_diffusion_3,
    "flux": flux,
}
STEPS = {"sd15": 5, "sdxl": 5, "lcm": 4, "sd3": 5, "flux": 4}


@cache
def saved(family: str) -> str:
    """A folder with a random pipeline of that family."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family]()
    folder = tempfile.mkdtemp(prefix=f"rebel-{family}-")
    pipeline.save_pretrained(folder)
    return folder


def pipeline(family: str, seed: int = 0) -> Any:
    """A random pipeline of that family, the same for the same seed."""
    torch.manual_seed(seed)
    return FAMILIES[family]()


# -- whole runs -----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "eta": 5.0,
    "num_generations": 3,
    "prompts_per_iteration": 4,
    "steps_per_iteration": 2,
    "num_iterations": 1,
    "images_per_micro_batch": 4,
    "sampling_batch": 6,
    "iterations": 3,
    "learning_rate": 1e-3,
    "lora_r": 2,
    "average": 0.0,
    "eval_prompts": 2,
    "eval_steps": 3,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}
TEXTS = ["a cat", "a dog", "the red house", "a small cat", "the dog", "a house on the house", "red", "small red dog"]


def redness(images: list[Any], prompts: list[str], **columns: Any) -> list[float]:
    """How much more red than blue an image is, in steps of brightness."""
    means = [np.asarray(image, dtype=float).mean(axis=(0, 1)) for image in images]
    return [float(mean[0] - mean[2]) for mean in means]


def reward(completions: list[Any], prompts: list[str], **columns: Any) -> list[float]:
    return redness(completions, prompts)


def job(folder: Path, family: str = "sd15", reward: Any = reward, callbacks: Any = (), **settings: Any) -> Job:
    """A run of a random pipeline in `folder`, ready to be carried out."""
    own = {"denoising_steps": STEPS[family], "output_dir": str(folder)}
    name = settings.pop("pipeline_name_or_path", None) or saved(family)
    config = RebelConfig(**{**SETTINGS, **own, **settings}, pipeline_name_or_path=name)
    prompts = [Prompt(text) for text in TEXTS]
    return build_image_job(
        config,
        build_pipeline(config),
        lambda notes: Weighted([PerCompletion(reward, notes=notes)]),
        (prompts[config.eval_prompts :], prompts[: config.eval_prompts]),
        callbacks,
    )


def trained(folder: Path, resume: bool = False, **settings: Any) -> Job:
    """The run in `folder`, carried out to its end or on from its last checkpoint."""
    made = job(folder, resume_from_checkpoint=resume, **settings)
    claim_folder(made.config, resume)
    carry_out(made, checkpoint_to_resume(made.config))
    return made
