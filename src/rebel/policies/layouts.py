"""The layouts in which traces go through a model: what their tensors are, and how much of them the model holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from rebel.policies.footprint import Load
from rebel.policies.packed import packed
from rebel.policies.rows import Rows, families, padded, shared_prefix
from rebel.policies.unpadded import unpadded
from rebel.types import TokenTrace

WORTH = 0.05
"""The share of padding below which padded rows are faster."""


@runtime_checkable
class Layout(Protocol):
    """A way of traces through a model. Which one is taken changes no log-probability."""

    @property
    def shares(self) -> bool:
        """Whether completions of a prompt can go on from one pass over it."""
        ...

    @property
    def one_mask(self) -> bool:
        """Whether a mask of attention is made once for all layers."""
        ...

    def rows(self, traces: Sequence[TokenTrace], device: torch.device) -> Rows:
        """The traces as tensors on this device."""
        ...

    def load(self, traces: Sequence[TokenTrace]) -> Load:
        """What of them goes through the model."""
        ...


@dataclass(frozen=True)
class Apart:
    """A row for each trace, padded to the longest."""

    shares = one_mask = False

    def rows(self, traces: Sequence[TokenTrace], device: torch.device) -> Rows:
        return padded(traces, device)

    def load(self, traces: Sequence[TokenTrace]) -> Load:
        return Load(len(traces) * max(map(len, traces)), 0, 0, written(traces))


@dataclass(frozen=True)
class PromptOnce:
    """Each prompt once, and its completions from its keys and values on, where that takes fewer tokens than rows."""

    shares, one_mask = True, False  # behind a cache every layer makes its own

    def rows(self, traces: Sequence[TokenTrace], device: torch.device) -> Rows:
        return shared_prefix(traces, device) if self.saves(traces) else padded(traces, device)

    def load(self, traces: Sequence[TokenTrace]) -> Load:
        return load_once(traces) if self.saves(traces) else Apart().load(traces)

    def saves(self, traces: Sequence[TokenTrace]) -> bool:
        """Whether fewer tokens, padding included, go through the model."""
        return prompted(traces) and load_once(traces).tokens < Apart().load(traces).tokens


def load_once(traces: Sequence[TokenTrace]) -> Load:
    """Of prompts that are padded to the longest of them, and completions likewise."""
    prompts = {trace.prompt for trace in traces}
    longest_prompt, longest = max(map(len, prompts)), max(len(trace.completion) for trace in traces)
    copied, completions = len(traces) * longest_prompt, len(traces) * longest
    tokens = len(prompts) * longest_prompt + completions
    return Load(tokens, copied, longest * (copied + completions), written(traces))


@dataclass(frozen=True)
class NoPadding:
    """One row with attention block by block, where much of the rows of another layout would be padding."""

    instead_of: Apart | PromptOnce
    one_mask = True

    @property
    def shares(self) -> bool:
        return self.instead_of.shares

    def rows(self, traces: Sequence[TokenTrace], device: torch.device) -> Rows:
        if prompted(traces) and self.saves(traces):
            return unpadded(traces, device, self.shares)
        return self.instead_of.rows(traces, device)

    def saves(self, traces: Sequence[TokenTrace]) -> bool:
        """Whether so much would be padding that the one row is faster."""
        last = len(traces)  # tokens that one row leaves out
        return self.load(traces).tokens + last < (1 - WORTH) * self.instead_of.load(traces).tokens

    def load(self, traces: Sequence[TokenTrace]) -> Load:
        """Of the one row; where its rows are kept they take at most `WORTH` more."""
        tokens = copied = pairs = 0
        for prompt, members in families(traces).items():
            shared = self.shares and len(members) > 1
            lengths = [len(traces[k].completion) - 1 for k in members]
            tokens += sum(lengths) + len(prompt) * (1 if shared else len(members))
            copied += len(prompt) * len(members) * shared
            pairs += sum(length * (len(prompt) + length) for length in lengths) * shared
        return Load(tokens, copied, pairs, written(traces))


@dataclass(frozen=True)
class Flex:
    """One row of prompts and completions, whose attention FlexAttention computes. It takes a GPU."""

    shares, one_mask = True, True

    def rows(self, traces: Sequence[TokenTrace], device: torch.device) -> Rows:
        return packed(traces, device) if prompted(traces) else padded(traces, device)

    def load(self, traces: Sequence[TokenTrace]) -> Load:
        tokens = sum(map(len, families(traces))) + sum(len(trace.completion) for trace in traces)
        return Load(tokens, 0, 0, written(traces))


def prompted(traces: Sequence[TokenTrace]) -> bool:
    """Whether every trace begins with a prompt, which its first token can be predicted from."""
    return all(trace.prompt for trace in traces)


def written(traces: Sequence[TokenTrace]) -> int:
    """How many tokens the policy wrote."""
    return sum(trace.tokens_written for trace in traces)
