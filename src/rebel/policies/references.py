"""Reference policies: a copy of the policy as it starts, its weights without the adapter, or its first adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from peft import PeftModel
from torch import Tensor
from trl.trainer.utils import use_adapter

from rebel.policies.causal_lm import CausalLM, disable_dropout
from rebel.policies.scorer import Scorer
from rebel.types import LogProb, TokenTrace


def frozen_copy(policy: CausalLM) -> LogProb:
    """log pi_ref by a second model: a frozen copy of this one as it is now."""
    scorer = Scorer(copy.deepcopy(policy.model).requires_grad_(False), policy.bare.temperature)
    return replace(policy, scorer=scorer).log_prob


def without_adapter(policy: CausalLM) -> LogProb:
    """log pi_ref by the same weights with the adapter off: no second model."""

    model = policy.model
    assert isinstance(model, PeftModel), "there is an adapter to turn off"

    def log_prob(traces: Sequence[TokenTrace]) -> Tensor:
        with model.disable_adapter():
            return plain(policy).log_prob(traces)

    return log_prob


def initial_adapter(policy: CausalLM) -> LogProb:
    """log pi_ref by a frozen copy of the adapter that the policy starts from."""
    model = policy.model
    assert isinstance(model, PeftModel), "there is an adapter to start from"
    model.add_adapter("reference", model.peft_config["default"])
    weights = dict(model.named_parameters())
    for name in [name for name in weights if ".default" in name]:
        weights[name.replace(".default", ".reference")].data.copy_(weights[name].data)
    model.set_adapter("default")
    disable_dropout(model.eval())  # what the new adapter came with

    def log_prob(traces: Sequence[TokenTrace]) -> Tensor:
        with use_adapter(model, "reference"):
            return plain(policy).log_prob(traces)

    return log_prob


def plain(policy: CausalLM) -> CausalLM:
    """The same policy without the wrapper for distribution: references take no part in its collectives."""
    return replace(policy, scorer=policy.bare)
