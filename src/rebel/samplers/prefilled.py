"""Sequences that are continued token by token: what the model remembers of them, in memory that is claimed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rebel.policies.causal_lm import CausalLM
from rebel.policies.rows import attention_of, full_attention

GROUPED = "grouped"


def grouped_attention(
    module: Any,
    query: Float[Tensor, "N H 1 D"],
    key: Float[Tensor, "N K T D"],
    value: Float[Tensor, "N K T D"],
    attention_mask: Float[Tensor, "N 1 1 T"] | None,
    scaling: float,
    **others: Any,
) -> tuple[Float[Tensor, "N 1 H D"], None]:
    """Attention of one new token. Heads that share keys are so many queries of one head, and no key is repeated.

    transformers repeats the keys of all tokens for each of those heads, at every token. A CPU is slow at its own
    attention where there are so few queries.
    """
    tokens, heads, _, width = query.shape
    shared = query.reshape(tokens, key.shape[1], heads // key.shape[1], width)
    if query.device.type == "cpu":
        scores = torch.matmul(shared * scaling, key.transpose(-1, -2))
        seen = scores if attention_mask is None else scores.add_(attention_mask)
        found = torch.matmul(seen.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value)
    else:
        found = scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(tokens, 1, heads, width), None


AttentionInterface.register(GROUPED, grouped_attention)


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for those to come: they are written in place, and nothing is copied."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Int[Tensor, " N"], room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.all_keys, self.all_values = roomy(keys, rows, room), roomy(values, rows, room)
        self.show(keys.shape[-2])

    def show(self, length: int) -> tuple[Tensor, Tensor]:
        """So many tokens are there: their keys and values."""
        keys, values = self.all_keys[:, :, :length], self.all_values[:, :, :length]
        self.keys, self.values = keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values with these behind them."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        self.all_keys[:, :, begin:end] = key_states
        self.all_values[:, :, begin:end] = value_states
        return self.show(end)


def roomy(states: Float[Tensor, "B H T D"], rows: Int[Tensor, " N"], room: int) -> Float[Tensor, "N H R D"]:
    """These rows of the states, with room for so many tokens."""
    _, heads, length, width = states.shape
    whole = states.new_empty(len(rows), heads, max(room, length), width)
    whole[:, :, :length] = states[rows]
    return whole


def with_room(cache: DynamicCache, rows: Int[Tensor, " N"], room: int) -> DynamicCache:
    """These rows of a cache. Layers that see a window of tokens forget others, and are left to do so."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) in (DynamicLayer, RoomyLayer):
            layers[index] = RoomyLayer(layer.keys, layer.values, rows, room)
        else:
            layer.batch_select_indices(rows)
    return cache


@dataclass(frozen=True)
class Prefilled:
    """Sequences so far: their cache, which of its tokens are no padding, and the logits of what comes next.

    `real` has a column for every token to come as well, and is None where nothing is padding. `grouped` says whether
    new tokens take the attention above.
    """

    policy: CausalLM
    cache: DynamicCache
    real: Bool[Tensor, "N R"] | None
    positions: Int[Tensor, " N"]
    room: int
    grouped: bool
    logits: Float[Tensor, "N V"]

    @classmethod
    def of(cls, policy: CausalLM, prompts: Sequence[Sequence[int]], group_size: int, tokens: int) -> Prefilled:
        """The prompts, padded on the left and computed once, then repeated for each of `tokens` long completions."""
        length = max(len(prompt) for prompt in prompts)
        padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        marks = [[False] * (length - len(prompt)) + [True] * (len(prompt) + tokens) for prompt in prompts]
        ids, real = (torch.tensor(x, device=policy.device) for x in (padded, marks))
        begins = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        cache = DynamicCache(config=policy.bare.causal.config)
        positions = (torch.arange(length, device=policy.device) - (length - begins[:, None])).clamp(min=0)
        given = None if all(len(prompt) == length for prompt in prompts) else real
        logits = forward(policy, ids, None if given is None else given[:, :length].long(), positions, cache)
        rows = torch.arange(len(prompts), device=policy.device).repeat_interleave(group_size)
        room = length + tokens
        left = None if given is None else given[rows]
        cache = with_room(cache, rows, room)
        return cls(policy, cache, left, begins[rows], room, takes_groups(policy.bare.causal), logits[rows])

    def only(self, keep: Bool[Tensor, " N"]) -> Prefilled:
        """These rows and no others."""
        rows = keep.nonzero()[:, 0]
        real = None if self.real is None or self.real[rows].all() else self.real[rows]
        cache = with_room(self.cache, rows, self.room)
        return replace(self, cache=cache, real=real, positions=self.positions[rows], logits=self.logits[rows])

    def then(self, tokens: Int[Tensor, " N"]) -> Prefilled:
        """One token further."""
        attention = attention_of(self.policy.bare.causal, GROUPED) if self.grouped else nullcontext()
        with attention:
            logits = forward(self.policy, tokens[:, None], self.seen(), self.positions[:, None], self.cache)
        return replace(self, positions=self.positions + 1, logits=logits)

    def seen(self) -> Tensor | None:
        """What the next token sees, of the tokens before it and itself."""
        if self.real is None:
            return None
        real = self.real[:, : self.cache.get_seq_length() + 1]
        if not self.grouped:
            return real.long()
        return torch.zeros_like(real, dtype=self.logits.dtype).masked_fill_(~real, -math.inf)[:, None, None]


def takes_groups(causal: PreTrainedModel) -> bool:
    """Whether attention over groups of heads is what the model computes: without windows, by the usual kernel."""
    return full_attention(causal) and causal.config._attn_implementation == "sdpa"


def forward(
    policy: CausalLM,
    ids: Int[Tensor, "N T"],
    mask: Tensor | None,
    positions: Int[Tensor, "N T"],
    cache: DynamicCache,
) -> Float[Tensor, "N V"]:
    """Logits of the next token."""
    output = policy.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
