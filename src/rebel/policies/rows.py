"""Token traces as tensors: a row for each of them, or each prompt once for all the completions that begin with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rebel.types import TokenTrace


class Places(NamedTuple):
    """Every token that the policy wrote: the trace it is of, the token, and the hidden state that predicts it."""

    trace: Int[Tensor, " K"]
    target: Int[Tensor, " K"]
    hidden: Float[Tensor, "K H"]


@dataclass(frozen=True, slots=True)
class Stretches:
    """A completion in `count` stretches of so many written tokens each; the last has whatever is left."""

    tokens: int
    count: int

    def of(self, trace: Int[Tensor, " K"]) -> Int[Tensor, " K"]:
        """The stretch of every written token; those of a trace stand together and in order."""
        place = torch.arange(len(trace), device=trace.device)
        begins = torch.ones_like(trace, dtype=torch.bool)
        begins[1:] = trace[1:] != trace[:-1]
        within = place - torch.where(begins, place, 0).cummax(dim=0).values
        return (within // self.tokens).clamp(max=self.count - 1)


WHOLE = Stretches(tokens=1, count=1)
"""All of a completion together."""


@runtime_checkable
class Rows(Protocol):
    """Traces in a layout of tensors."""

    @property
    def traces(self) -> int:
        """How many they are."""
        ...

    def places(self, causal: PreTrainedModel) -> Places:
        """Every token that the policy wrote, with the hidden state that predicts it."""
        ...


class Padded(NamedTuple):
    """A row for each trace, padded on the right, where causal attention cannot see the padding."""

    ids: Int[Tensor, "N T"]
    written: Bool[Tensor, "N T"]

    @property
    def traces(self) -> int:
        return len(self.ids)

    def places(self, causal: PreTrainedModel) -> Places:
        hidden = backbone(causal)(input_ids=self.ids, use_cache=False).last_hidden_state
        row, column = self.written[:, 1:].nonzero(as_tuple=True)
        return Places(row, self.ids[row, column + 1], hidden[row, column])


class BranchingLayer(DynamicLayer):
    """Keys and values of prompts, kept once and repeated where a completion that goes on from them reads them."""

    def __init__(self, keys: Tensor, values: Tensor, owner: Int[Tensor, " N"]) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.of_prompts, self.owner = (keys, values), owner

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of every completion behind those of its prompt. They are not kept."""
        keys, values = self.of_prompts
        keys, values = keys[self.owner], values[self.owner]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def branch(cache: DynamicCache, owner: Int[Tensor, " N"]) -> None:
    """Go on from the prompts in a cache with completions of these prompts."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if layer.__class__ is DynamicLayer:
            layers[index] = BranchingLayer(layer.keys, layer.values, owner)
        else:  # a window of tokens, which it moves itself
            layer.batch_select_indices(owner)


class SharedPrefix(NamedTuple):
    """Prompts, padded on the left, and completions, padded on the right, each with the index of its prompt.

    A prompt goes through the model once; its keys and values are what each of its completions goes on from. Gradients
    flow back through them, so the result is that of whole rows.
    """

    prompts: Int[Tensor, "B P"]
    real: Bool[Tensor, "B P"]
    owner: Int[Tensor, " N"]
    ids: Int[Tensor, "N C"]
    written: Bool[Tensor, "N C"]

    @property
    def traces(self) -> int:
        return len(self.ids)

    def places(self, causal: PreTrainedModel) -> Places:
        cache = DynamicCache(config=causal.config)
        before = self.after_prompts(causal, cache)[self.owner]
        hidden = before[:, None]
        if self.ids.shape[1] > 1:
            branch(cache, self.owner)
            hidden = torch.cat([hidden, self.within_completions(causal, cache)], dim=1)
        row, column = self.written.nonzero(as_tuple=True)
        return Places(row, self.ids[row, column], hidden[row, column])

    def after_prompts(self, causal: PreTrainedModel, cache: DynamicCache) -> Float[Tensor, "B H"]:
        """The hidden state that predicts the first token of a completion."""
        positions = (self.real.cumsum(dim=1) - 1).clamp(min=0)
        output = backbone(causal)(
            input_ids=self.prompts,
            attention_mask=attended(self.real),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def within_completions(self, causal: PreTrainedModel, cache: DynamicCache) -> Float[Tensor, "N C1 H"]:
        """The hidden states that predict all the others. What is padded behind a completion is not attended to."""
        ids = self.ids[:, :-1]
        begin = self.real.sum(dim=1)[self.owner]
        past = torch.cat([self.real[self.owner], torch.ones_like(ids, dtype=torch.bool)], dim=1)
        output = backbone(causal)(
            input_ids=ids,
            attention_mask=attended(past),
            position_ids=begin[:, None] + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state


@contextmanager
def attention_of(model: Any, name: str) -> Iterator[None]:
    """Within this context the model computes attention in this way."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def attention_in(model: Any) -> str:
    """The way in which the model computes attention now."""
    return model.config.get_text_config()._attn_implementation


def full_attention(causal: PreTrainedModel) -> bool:
    """Whether every token of the model sees all that stand before it, and no window of them."""
    config = causal.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers == {"full_attention"} and getattr(config, "sliding_window", None) is None


def backbone(causal: PreTrainedModel) -> Any:
    """The model without its output layer."""
    return getattr(causal, causal.base_model_prefix)


def attended(real: Bool[Tensor, "N T"]) -> Int[Tensor, "N T"] | None:
    """The mask that transformers takes, and none where nothing is padding."""
    return None if bool(real.all()) else real.long()


def families(traces: Sequence[TokenTrace]) -> dict[tuple[int, ...], list[int]]:
    """The places of the traces by prompt, in the order of its first completion."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index, trace in enumerate(traces):
        found.setdefault(trace.prompt, []).append(index)
    return found


def grid(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> Int[Tensor, "N T"]:
    """Rows of numbers as one tensor, padded with zeros to the longest. numpy reads them several times as fast."""
    longest = max(map(len, rows))
    fillings = [(0,) * (longest - len(row)) for row in rows]
    whole = [(*fill, *row) if left else (*row, *fill) for row, fill in zip(rows, fillings, strict=True)]
    return torch.from_numpy(np.array(whole, dtype=np.int64)).to(device)


def padded(traces: Sequence[TokenTrace], device: torch.device) -> Padded:
    """Whole rows, and the mask of written tokens, from lengths alone: no token value means padding."""
    ids = [trace.prompt + trace.completion for trace in traces]
    written = [(False,) * len(trace.prompt) + trace.written for trace in traces]
    return Padded(grid(ids, device), grid(written, device).bool())


def shared_prefix(traces: Sequence[TokenTrace], device: torch.device) -> SharedPrefix:
    """Each prompt once, in the order of its first completion."""
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(trace.prompt for trace in traces))}
    return SharedPrefix(
        grid(list(index), device, left=True),
        grid([(True,) * len(prompt) for prompt in index], device, left=True).bool(),
        torch.tensor([index[trace.prompt] for trace in traces], device=device),
        grid([trace.completion for trace in traces], device),
        grid([trace.written for trace in traces], device).bool(),
    )
