"""All tokens of a micro-batch in one row, by FlexAttention, which skips the blocks of attention that nobody sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from rebel.policies.rows import Places, attention_of, backbone, families
from rebel.types import TokenTrace


class Packed(NamedTuple):
    """One row of everything: each prompt followed by its completions, of which every one sees the prompt and itself.

    Nothing is padded. `part` is 0 for prompts; `before` is where the prediction of a written token is made.
    """

    ids: Int[Tensor, "1 T"]
    positions: Int[Tensor, "1 T"]
    group: Int[Tensor, " T"]
    part: Int[Tensor, " T"]
    trace: Int[Tensor, " K"]
    before: Int[Tensor, " K"]
    at: Int[Tensor, " K"]
    traces: int

    def places(self, causal: PreTrainedModel) -> Places:
        with attention_of(causal, "flex_attention"):
            output = backbone(causal)(
                input_ids=self.ids, attention_mask=self.seen(), position_ids=self.positions, use_cache=False
            )
        return Places(self.trace, self.ids[0, self.at], output.last_hidden_state[0, self.before])

    def seen(self) -> BlockMask:
        """Which tokens see which."""
        group, part = self.group, self.part
        sees = lambda batch, head, now, then: (  # noqa: E731 - FlexAttention counts its arguments
            (then <= now) & (group[then] == group[now]) & ((part[then] == 0) | (part[then] == part[now]))
        )
        return create_block_mask(sees, None, None, len(group), len(group), device=str(group.device))


def packed(traces: Sequence[TokenTrace], device: torch.device) -> Packed:
    """The traces by prompt, in the order of its first completion. Every prompt has a token at least."""
    columns: list[tuple[int, int, int, int]] = []  # id, position, group, part
    places: list[tuple[int, int, int]] = []  # trace, where the prediction is made, where the token stands
    for group, (prompt, members) in enumerate(families(traces).items()):
        columns += [(token, k, group, 0) for k, token in enumerate(prompt)]
        ends = len(columns) - 1
        for part, index in enumerate(members, start=1):
            begins, trace = len(columns), traces[index]
            columns += [(token, len(prompt) + k, group, part) for k, token in enumerate(trace.completion)]
            written = [k for k, own in enumerate(trace.written) if own]
            places += [(index, begins + k - 1 if k else ends, begins + k) for k in written]
    ids, positions, groups, parts = torch.tensor(columns, device=device).unbind(dim=1)
    index, before, at = torch.tensor(places, device=device).view(-1, 3).unbind(dim=1)
    return Packed(ids[None], positions[None], groups, parts, index, before, at, len(traces))
