"""Token traces as tensors: a row for each of them, or each prompt once for all the completions that begin with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from rebel.types import TokenTrace


class Places(NamedTuple):
    """Every token that the policy wrote: the trace it is of, the token, and the hidden state that predicts it."""

    trace: Int[Tensor, " K"]
    target: Int[Tensor, " K"]
    hidden: Float[Tensor, "K H"]


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
            cache.batch_select_indices(self.owner)
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


Rows = Padded | SharedPrefix


def backbone(causal: PreTrainedModel) -> Any:
    """The model without its output layer."""
    return getattr(causal, causal.base_model_prefix)


def attended(real: Bool[Tensor, "N T"]) -> Int[Tensor, "N T"] | None:
    """The mask that transformers takes, and none where nothing is padding."""
    return None if bool(real.all()) else real.long()


def tokens(traces: Sequence[TokenTrace], share: bool) -> int:
    """Tokens, padding included, that go through the model for these traces together."""
    apart = len(traces) * max(len(trace) for trace in traces)
    return min(apart, tokens_shared(traces)) if share else apart


def tokens_shared(traces: Sequence[TokenTrace]) -> int:
    prompts = {trace.prompt for trace in traces}
    return len(prompts) * max(map(len, prompts)) + len(traces) * max(len(trace.completion) for trace in traces)


def rows(traces: Sequence[TokenTrace], device: torch.device, share: bool) -> Rows:
    """The traces in the layout with fewer tokens."""
    apart = len(traces) * max(len(trace) for trace in traces)
    nothing_before = any(not trace.prompt for trace in traces)
    if not share or nothing_before or tokens_shared(traces) >= apart:
        return padded(traces, device)
    return shared_prefix(traces, device)


def padded(traces: Sequence[TokenTrace], device: torch.device) -> Padded:
    """Whole rows, and the mask of written tokens, from lengths alone: no token value means padding."""
    ids = [torch.tensor(trace.prompt + trace.completion) for trace in traces]
    written = [torch.tensor((False,) * len(trace.prompt) + trace.written) for trace in traces]
    return Padded(pad_sequence(ids, batch_first=True).to(device), pad_sequence(written, batch_first=True).to(device))


def shared_prefix(traces: Sequence[TokenTrace], device: torch.device) -> SharedPrefix:
    """Each prompt once, in the order of its first completion."""
    index = {prompt: k for k, prompt in enumerate(dict.fromkeys(trace.prompt for trace in traces))}
    prompts = [torch.tensor(prompt) for prompt in index]
    real = [torch.ones(len(prompt), dtype=torch.bool) for prompt in index]
    ids = [torch.tensor(trace.completion) for trace in traces]
    written = [torch.tensor(trace.written) for trace in traces]
    return SharedPrefix(
        pad_sequence(prompts, batch_first=True, padding_side="left").to(device),
        pad_sequence(real, batch_first=True, padding_side="left").to(device),
        torch.tensor([index[trace.prompt] for trace in traces], device=device),
        pad_sequence(ids, batch_first=True).to(device),
        pad_sequence(written, batch_first=True).to(device),
    )
