"""The weights of a policy as a checkpoint has them: under Hugging Face's names, with its adapter merged."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM

ADAPTER = "default"
"""peft's name for the adapter that is trained."""

PARTS_OF_ADAPTER = re.compile(r"\.(lora_\w+|original_module|modules_to_save\.(?!default\.)\w+)\.")
"""In names of tensors: what is merged into others, or stands beside what is used."""


@torch.no_grad()
def weights_of(policy: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every weight, one after the other; the policy itself is not touched.

    A tied output layer comes under its own name too: vLLM keeps its old one, in silence, where that is left out.
    An adapter is merged here, tensor by tensor, and not in the model, whose weights would drift by the rounding of
    each merging and unmerging.
    """
    causal: nn.Module = policy.bare.causal
    layers = {name: module for name, module in causal.named_modules() if isinstance(module, LoraLayer)}
    for name, value in causal.state_dict().items():
        if PARTS_OF_ADAPTER.search(name):
            continue
        module, _, kind = name.rpartition(".base_layer.")
        merged = with_delta(value, layers[module]) if kind == "weight" else value
        yield name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", "."), merged


def with_delta(weight: Tensor, layer: LoraLayer) -> Tensor:
    """A weight with what the adapter adds to it, added in fp32."""
    delta = layer.get_delta_weight(ADAPTER)  # pyright: ignore[reportAttributeAccessIssue]
    return (weight.float() + delta.float()).to(weight.dtype)


def check_mergeable(policy: CausalLM) -> None:
    """Raises RebelError for an adapter that is more than one product added to a weight."""
    if not isinstance(policy.model, PeftModel):
        return
    lora = policy.model.peft_config[ADAPTER]
    kind = str(getattr(lora.peft_type, "value", lora.peft_type))
    if kind == "LORA" and getattr(lora, "use_dora", False):
        kind = "DoRA"
    if kind != "LORA" or getattr(lora, "lora_bias", False):
        raise RebelError(
            f"--sampler vllm takes whole models and plain LoRA adapters, whose weights are merged for it; this one is "
            f"{kind if kind != 'LORA' else 'LoRA with a bias'}. Use --sampler generate"
        )
