"""The model that is tuned, its tokenizer, policy and reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rebel.build.credit import stretches_of
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.loading import loaded
from rebel.policies.causal_lm import CausalLM, causal_lm, footprint_of
from rebel.policies.layouts import Layout
from rebel.policies.references import frozen_copy, initial_adapter, without_adapter
from rebel.policies.scorer import LanguageModel
from rebel.policies.sparing import Sparing, all_of, offloading, recomputable, recomputing
from rebel.policies.trial import flex
from rebel.types import LogProb

PACKED = "flex_attention"
"""The attention for which prompts and completions are packed into one row. Completions are drawn with the usual one."""


def build_accelerator(config: RebelConfig) -> Accelerator:
    """Devices, processes and precision of this run. Sharded weights are refused: sampling needs them whole."""
    if config.fp16 and not torch.cuda.is_available():
        raise RebelError("--fp16 needs a CUDA device, and there is none; use --bf16, or neither")
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    whole = GradientAccumulationPlugin(num_steps=1)  # else a launcher's setting would scale the gradient
    accelerator = Accelerator(cpu=config.use_cpu, mixed_precision=precision, gradient_accumulation_plugin=whole)
    if str(accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise RebelError(
            f"accelerate is set up for {accelerator.distributed_type.value}; this version trains with one process "
            "or several that each hold the whole model (MULTI_GPU, MULTI_CPU): choose that in `accelerate config`"
        )
    return accelerator


def build_model(config: RebelConfig) -> LanguageModel:
    """The model of --model_name_or_path, with its adapter if one is asked for."""
    name = str(config.model_name_or_path)
    settings: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "dtype": weight_type(config)}
    if config.attn_implementation and config.attn_implementation != PACKED:
        settings["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        settings["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = loaded(name, "model", partial(AutoModelForCausalLM.from_pretrained, name, **settings))
    return with_adapter(model, config) if config.adapter else model


def weight_type(config: RebelConfig) -> str | torch.dtype:
    """fp32 for weights that are trained whole (small steps vanish in bf16); frozen ones as they were saved."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return "auto" if config.adapter else torch.float32


def build_tokenizer(config: RebelConfig) -> PreTrainedTokenizerBase:
    name = str(config.model_name_or_path)
    load = partial(AutoTokenizer.from_pretrained, name, trust_remote_code=config.trust_remote_code)
    return loaded(name, "tokenizer", load)


def with_adapter(model: PreTrainedModel, config: RebelConfig, lora: PeftConfig | None = None) -> PeftModel:
    """The model with a new LoRA adapter, or with the one of --adapter_path to go on from."""
    if config.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # see build_sparing
    if config.adapter_path:
        return PeftModel.from_pretrained(model, config.adapter_path, is_trainable=True)
    names = config.lora_target_modules
    targets = names[0] if names == ["all-linear"] else names
    lora = lora or LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:  # no layer has such a name, or one that peft cannot adapt
        reason = str(error).splitlines()[0]
        raise RebelError(
            f"--lora_target_modules {' '.join(names)}: {reason} Use all-linear, or names of layers of the model"
        ) from error


def build_policy(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, config: RebelConfig) -> CausalLM:
    policy = causal_lm(model, tokenizer, config.temperature, config.chat_template_kwargs, config.shared_prefix)
    layout = build_layout(policy, config)
    return replace(
        policy,
        layout=layout,
        footprint=footprint_of(policy.bare, layout, recomputed=config.gradient_checkpointing),
        sparing=build_sparing(model, config),
        stretches=stretches_of(config),
    )


def build_layout(policy: CausalLM, config: RebelConfig) -> Layout:
    """How traces go through the model: as it was found, or packed if that is asked for."""
    if config.attn_implementation != PACKED:
        return policy.layout
    packed = flex(policy.bare) if config.shared_prefix else None
    if packed is None:
        raise RebelError(
            f"--attn_implementation {PACKED} packs prompts and their completions into one row: that takes a GPU, "
            "--shared_prefix, and a model that transformers can give this attention and whose own has no windows; "
            "leave it out"
        )
    return packed


def build_sparing(model: LanguageModel, config: RebelConfig) -> Sparing:
    """How a backward pass keeps less in memory."""
    if config.gradient_checkpointing and not recomputable(model):
        raise RebelError(
            f"--gradient_checkpointing: {type(model).__name__} has no layers that transformers can compute again; "
            "leave it out, and lower --tokens_per_micro_batch instead"
        )
    if config.activation_offloading and next(model.parameters()).device.type == "cpu":
        raise RebelError(
            "--activation_offloading moves activations from a GPU to the memory of the host, and there is no GPU here; "
            "leave it out"
        )
    chosen = ((recomputing, config.gradient_checkpointing), (offloading, config.activation_offloading))
    ways = [way for way, wanted in chosen if wanted]
    return partial(all_of, ways) if ways else nullcontext


def build_reference(policy: CausalLM, config: RebelConfig) -> LogProb | None:
    """log pi_ref, or None where nothing asks for it: beta 0 and no KL to measure."""
    adapter = isinstance(policy.model, PeftModel)
    wanted = adapter if config.track_kl is None else config.track_kl
    if not config.beta and not wanted:
        return None
    kind = config.reference
    if kind == "auto":
        kind = "model" if not adapter else "initial_adapter" if config.adapter_path else "base"
    if kind != "model" and not adapter:
        raise RebelError(f"--reference {kind} needs an adapter; use --use_peft, or --reference model")
    return {"model": frozen_copy, "base": without_adapter, "initial_adapter": initial_adapter}[kind](policy)


def reference_is_copy(reference: LogProb | None, policy: CausalLM, config: RebelConfig) -> bool:
    return reference is not None and (config.reference == "model" or not isinstance(policy.model, PeftModel))
