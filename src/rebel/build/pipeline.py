"""The pipeline that is tuned: loading it, the adapter in it, its policy and reference, and how it is saved."""

from __future__ import annotations

import importlib
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.learner import Learner
from rebel.loading import loaded
from rebel.model_card import pipeline_card
from rebel.policies.diffusion import Diffusion, denoiser_of, diffusion, frozen_copy, without_adapter
from rebel.policies.path import parameters
from rebel.types import LogProb

FLAG = "--pipeline_name_or_path"
LORA, ADAPTER = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
"""Files with an adapter: as diffusers writes it, and as peft does where a pipeline has no way of its own."""

REDUCED = (torch.bfloat16, torch.float16)


def build_pipeline(config: RebelConfig, cuda: bool | None = None) -> DiffusionPipeline:
    """The pipeline of --pipeline_name_or_path, with what is to be trained in it requiring gradients."""
    cuda = torch.cuda.is_available() and not config.use_cpu if cuda is None else cuda
    pipeline = load_pipeline(str(config.pipeline_name_or_path), weight_type(config, cuda), config.trust_remote_code)
    return trainable(pipeline, config)


def load_pipeline(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> DiffusionPipeline:
    """A pipeline of diffusers by its folder or hub name."""
    more = {"trust_remote_code": True} if trust_remote_code else {}
    disable_progress_bar()
    load = partial(pipeline_class(Path(name)).from_pretrained, name, dtype=dtype, **more)
    return loaded(name, "pipeline", load, FLAG)


def pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """Which class loads the pipeline of a folder.

    diffusers looks the class up among its own. One of another installed package is where its components come from.
    """
    index = folder / "model_index.json"
    parts = json.loads(index.read_text("utf-8")) if index.is_file() else {}
    name = parts.get("_class_name")
    if not isinstance(name, str) or hasattr(diffusers, name):
        return DiffusionPipeline
    packages = {part[0] for part in parts.values() if isinstance(part, list) and part and isinstance(part[0], str)}
    modules = [importlib.import_module(package) for package in sorted(packages) if is_installed(package)]
    found = [getattr(module, name) for module in modules if hasattr(module, name)]
    return found[0] if found else DiffusionPipeline


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def weight_type(config: RebelConfig, cuda: bool) -> torch.dtype:
    """fp32 for weights that are trained whole; frozen ones may be bf16 where that is fast."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if config.adapter and cuda else torch.float32


def trainable(pipeline: DiffusionPipeline, config: RebelConfig) -> DiffusionPipeline:
    """The pipeline with a new adapter, the one of --adapter_path, or all of its denoiser to train."""
    denoiser = denoiser_of(pipeline)[1]
    denoiser.requires_grad_(not config.adapter)
    if config.adapter_path:
        load_adapter(pipeline, Path(config.adapter_path))
    elif config.adapter:
        add_lora(denoiser, config)
    for name, weight in denoiser.named_parameters() if config.adapter else []:
        if "lora_" in name:
            weight.requires_grad_(True)
            weight.data = weight.data.float() if weight.dtype in REDUCED else weight.data  # small steps vanish in bf16
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return pipeline


def add_lora(denoiser: Any, config: RebelConfig) -> None:
    """A new adapter, which changes nothing until it is trained."""
    names = config.lora_target_modules
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=linear if names == ["all-linear"] else names,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            inject(lora, denoiser)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise RebelError(f"--lora_target_modules {' '.join(names)}: {reason}") from error


def inject(lora: PeftConfig, denoiser: Any) -> None:
    """Put an adapter into the model, by diffusers where it knows how to."""
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(lora)
    else:
        inject_adapter_in_model(lora, denoiser)
        denoiser.peft_config = {"default": lora}


def load_adapter(pipeline: Any, folder: Path) -> None:
    """Put a saved adapter into the pipeline."""
    if (folder / ADAPTER).exists():
        denoiser, lora = denoiser_of(pipeline)[1], LoraConfig.from_pretrained(str(folder))
        inject(lora, denoiser)
        set_peft_model_state_dict(denoiser, load_file(folder / ADAPTER))
        return
    if not (folder / LORA).exists() or not hasattr(pipeline, "load_lora_weights"):
        raise RebelError(f"--adapter_path {folder} has neither {LORA} nor {ADAPTER}: give the folder of an adapter")
    pipeline.load_lora_weights(str(folder), weight_name=LORA, adapter_name="default")


def build_diffusion(pipeline: DiffusionPipeline, config: RebelConfig, accelerator: Accelerator) -> Diffusion:
    """The policy on its device. In reduced precision batches have one size, so that results do not depend on it."""
    pipeline.to(accelerator.device)
    return to_diffusion(pipeline, config)


def to_diffusion(pipeline: DiffusionPipeline, config: RebelConfig) -> Diffusion:
    dtype = next(denoiser_of(pipeline)[1].parameters()).dtype
    reduced = dtype in REDUCED or config.bf16 or config.fp16
    return diffusion(
        pipeline,
        config.denoising_steps,
        config.noise_level,
        config.noise_floor,
        config.guidance_scale,
        config.image_size,
        batch=config.images_per_micro_batch if reduced else 0,
    )


def build_reference(policy: Diffusion, config: RebelConfig) -> LogProb | None:
    """log pi_ref, or None where nothing asks for it: beta 0 and no KL to measure."""
    wanted = config.adapter if config.track_kl is None else config.track_kl
    if not config.beta and not wanted:
        return None
    if config.reference in ("base", "initial_adapter") and not config.adapter:
        raise RebelError(f"--reference {config.reference} needs an adapter; use --use_peft, or --reference model")
    base = config.reference == "base" or (config.reference == "auto" and config.adapter and not config.adapter_path)
    return without_adapter(policy) if base else frozen_copy(policy)


def save_pipeline(config: RebelConfig, learner: Learner, folder: Path) -> None:
    """Write the policy (its average, if one is kept): an adapter, or the whole pipeline, with a model card."""
    policy = learner.policy
    assert isinstance(policy, Diffusion), "build_diffusion made it"
    folder.mkdir(parents=True, exist_ok=True)
    with learner.use_average():
        if config.adapter:
            save_adapter(policy.pipeline, folder)
        else:
            policy.pipeline.save_pretrained(str(folder))
    (folder / "README.md").write_text(pipeline_card(config, learner, type(policy.pipeline).__name__))


def save_adapter(pipeline: Any, folder: Path) -> None:
    """As `pipeline.load_lora_weights` loads it, or as peft does where the pipeline has no such method."""
    name, denoiser = denoiser_of(pipeline)
    lora, weights = denoiser.peft_config["default"], get_peft_model_state_dict(denoiser, adapter_name="default")
    layers, metadata = f"{name}_lora_layers", f"{name}_lora_adapter_metadata"
    save = getattr(type(pipeline), "save_lora_weights", None)
    if save and {layers, metadata} <= parameters(save).keys():
        save(str(folder), **{layers: weights, metadata: lora.to_dict()})
    else:
        lora.save_pretrained(str(folder))
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / ADAPTER)


def saved_pipeline(folder: Path, config: RebelConfig, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The tuned pipeline of a run or of a checkpoint: the whole of it, or its adapter in the one it began with."""
    if (folder / "model_index.json").exists():
        return load_pipeline(str(folder), dtype)
    pipeline = load_pipeline(str(config.pipeline_name_or_path), dtype, config.trust_remote_code)
    load_adapter(pipeline, folder)
    return pipeline
