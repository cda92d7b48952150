"""All tokens of a micro-batch in one row without padding: only attention is computed block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rebel.policies.rows import Places, attention_in, attention_of, backbone, families, grid
from rebel.types import TokenTrace

BLOCKS = "blocks"
"""What transformers knows this attention by."""

SPARE = 0.25
"""The share of its pairs of tokens that a block may spend on padding; more blocks are more calls."""

CALL = 1024
"""Pairs of tokens that take as long as a call."""


class Run(NamedTuple):
    """Consecutive tokens of the row, and those of the prompt that they go on from (none where they begin with it)."""

    begins: int
    length: int
    prompt: int = 0
    before: int = 0

    @property
    def seen(self) -> int:
        """How many tokens the last of them sees."""
        return self.before + self.length

    def keys(self) -> list[int]:
        return [*range(self.prompt, self.prompt + self.before), *range(self.begins, self.begins + self.length)]


@dataclass(frozen=True)
class Block:
    """Runs of like length, whose attention is computed together: places in the row, padded on the right.

    Keys of runs that go on from a prompt are those of the prompt and their own.
    """

    query: Int[Tensor, "n Q"]
    key: Int[Tensor, "n K"]
    before: Int[Tensor, " n"]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, like: Tensor) -> Float[Tensor, "n 1 Q K"] | None:
        """What is added to the logits of attention: none where it is the usual causal one. Made once for all layers."""
        if window is None and self.query.shape == self.key.shape:
            return None
        if window not in self.masks:
            now = self.before[:, None, None] + torch.arange(self.query.shape[1], device=like.device)[:, None]
            then = torch.arange(self.key.shape[1], device=like.device)
            seen = (then <= now) if window is None else (then <= now) & (then > now - window)
            hidden = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
            self.masks[window] = hidden[:, None]
        return self.masks[window]


@dataclass(frozen=True)
class Unpadded:
    """One row of everything: each prompt once, followed by its completions but for their last tokens.

    `before` is where the prediction of a written token is made; `order` where the outcome of a token of the row stands
    in those of all blocks.
    """

    ids: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    trace: Int[Tensor, " K"]
    target: Int[Tensor, " K"]
    before: Int[Tensor, " K"]
    blocks: tuple[Block, ...]
    order: Int[Tensor, " T"]
    traces: int

    def places(self, causal: PreTrainedModel) -> Places:
        with attention_of(causal, BLOCKS):
            output = backbone(causal)(input_ids=self.ids, position_ids=self.positions, use_cache=False, blocks=self)
        return Places(self.trace, self.target, output.last_hidden_state[0, self.before])


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **how: Any
) -> tuple[Float[Tensor, "1 T h D"], None]:
    """Attention of the one row, in the form in which transformers calls it."""
    layout: Unpadded = how.pop(BLOCKS)
    window = how["sliding_window"] if windowed(module.config) else None
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    found = []
    for block in layout.blocks:
        q, k, v = taken(queries, block.query), taken(keys, block.key), taken(values, block.key)
        out, _ = sdpa_attention_forward(module, q, k, v, block.mask(window, query), **how)
        found.append(out.flatten(0, 1))
    return torch.cat(found).index_select(0, layout.order)[None], None


AttentionInterface.register(BLOCKS, attend)


def taken(states: Float[Tensor, "T h D"], places: Int[Tensor, "n L"]) -> Float[Tensor, "n h L D"]:
    """The states at these places."""
    return states.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


def separable(causal: PreTrainedModel) -> bool:
    """Whether the model's attention is one that is known here: whole, or of windows, by transformers' sdpa."""
    layers = set(getattr(causal.config.get_text_config(), "layer_types", None) or [])
    return attention_in(causal) == "sdpa" and layers <= {"full_attention", "sliding_attention"}


def windowed(config: Any) -> bool:
    """Whether some layers see a window of tokens alone. They are told its length."""
    return getattr(config, "sliding_window", None) is not None


def unpadded(traces: Sequence[TokenTrace], device: torch.device, share: bool = True) -> Unpadded:
    """The traces, with a prompt of several once if it is to be shared. Every prompt has a token at least."""
    row = Row()
    owners: list[int] = []  # of each written token: its trace, itself, and where its prediction is made
    targets: list[int] = []
    places: list[int] = []
    for prompt, members in families(traces).items():
        shared = share and len(members) > 1
        head = row.add(prompt) if shared else 0
        for index in members:
            own = traces[index]
            if shared:
                begins, last = row.add(own.completion[:-1], head, len(prompt)), head + len(prompt) - 1
            else:
                begins = row.add(prompt + own.completion[:-1]) + len(prompt)
                last = begins - 1
            owners += [index] * own.tokens_written
            targets += compress(own.completion, own.written)
            places += compress((last, *range(begins, begins + len(own.completion) - 1)), own.written)
    together = row.bundles()
    blocks, order = tuple(block(runs, device) for runs in together), grid([order_of(together)], device)[0]
    ids, positions = grid([row.ids, row.positions], device)[:, None]
    trace, target, before = grid([owners, targets, places], device)
    return Unpadded(ids, positions, trace, target, before, blocks, order, len(traces))


@dataclass
class Row:
    """The row as it grows."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def add(self, tokens: Sequence[int], prompt: int = 0, before: int = 0) -> int:
        """Where these tokens begin."""
        begins = len(self.ids)
        if tokens:
            self.runs.append(Run(begins, len(tokens), prompt, before))
            self.positions.extend(range(before, before + len(tokens)))
            self.ids.extend(tokens)
        return begins

    def bundles(self) -> list[list[Run]]:
        """Runs of like length together; those that begin with their prompt and those that go on from it apart."""
        roots = [run for run in self.runs if not run.before]
        return bundles(roots) + bundles([run for run in self.runs if run.before])


def order_of(blocks: Sequence[Sequence[Run]]) -> list[int]:
    """Where each token of the row stands in the outcomes of all blocks, padding included."""
    order = [0] * sum(run.length for runs in blocks for run in runs)
    done = 0
    for runs in blocks:
        longest = max(run.length for run in runs)
        for run in runs:
            order[run.begins : run.begins + run.length] = range(done, done + run.length)
            done += longest
    return order


def bundles(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of like length together, as long as little of the pairs of tokens in a bundle is padding."""
    found: list[list[Run]] = []
    real = seen = 0
    for run in sorted(runs, key=lambda run: (run.length, run.before), reverse=True):
        real, seen = real + run.length * run.seen, max(seen, run.seen)
        pairs = (len(found[-1]) + 1) * found[-1][0].length * seen if found else 0  # the first is the longest
        if found and pairs - real <= max(CALL, SPARE * pairs):
            found[-1].append(run)
        else:
            found.append([run])
            real, seen = run.length * run.seen, run.seen
    return found


def block(runs: Sequence[Run], device: torch.device) -> Block:
    return Block(
        grid([range(run.begins, run.begins + run.length) for run in runs], device),
        grid([run.keys() for run in runs], device),
        torch.tensor([run.before for run in runs], device=device),
    )
