"""What a model can do, tried on a few tokens before it is relied on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from rebel.errors import RebelError
from rebel.policies.layouts import Apart, Flex, Layout, NoPadding, PromptOnce
from rebel.policies.packed import packed
from rebel.policies.rows import Padded, Rows, full_attention, padded, shared_prefix
from rebel.policies.scorer import Scorer
from rebel.policies.unpadded import separable, unpadded
from rebel.types import TokenTrace


@torch.no_grad()
def check_head(scorer: Scorer) -> None:
    """Refuse a model whose logits are not its output embedding of its last hidden state."""
    ids = probe_ids(scorer, 8)
    logits = (scorer.model(input_ids=ids, use_cache=False).logits[0, :-1].float() / scorer.temperature).log_softmax(-1)
    expected = logits.gather(-1, ids[0, 1:, None]).sum()
    found = scorer(Padded(ids, torch.ones_like(ids, dtype=torch.bool))).float().sum()
    if not torch.allclose(found, expected, rtol=closeness(scorer), atol=closeness(scorer)):
        raise RebelError(
            f"{type(scorer.causal).__name__} changes its logits after the output layer in a way that rebel does not "
            "know (it knows final_logit_softcapping): its log-probabilities would be wrong"
        )


def leanest(scorer: Scorer, share: bool) -> Layout:
    """Of the layouts that are right for this model the one with the fewest tokens; `share` a prompt if it can be."""
    rows = PromptOnce() if share and shares_prefix(scorer) else Apart()
    return NoPadding(rows) if needs_no_padding(scorer) else rows


def flex(scorer: Scorer) -> Layout | None:
    """The layout of one row by FlexAttention, if there is a GPU for it and it is right for this model."""
    return Flex() if scorer.device.type == "cuda" and packs(scorer) else None


def shares_prefix(scorer: Scorer) -> bool:
    """Whether completions can go on from one pass over their prompt: tried, with prompts of two lengths.

    Models that keep no keys and values, or that take no positions, fail in ways of their own.
    """
    return agrees(scorer, shared_prefix)


def needs_no_padding(scorer: Scorer) -> bool:
    """Whether attention can be computed block by block: tried in the same way. On a GPU it has no figures yet."""
    return scorer.device.type == "cpu" and separable(scorer.causal) and agrees(scorer, unpadded)


def packs(scorer: Scorer) -> bool:
    """Whether FlexAttention computes everything in one row: tried in the same way."""
    return full_attention(scorer.causal) and agrees(scorer, packed)


@torch.no_grad()
def agrees(scorer: Scorer, layout: Callable[[Sequence[TokenTrace], torch.device], Rows]) -> bool:
    """Whether the hidden states of a layout, which every mistake in a mask or a position moves, are those of rows."""
    ids = tuple(probe_ids(scorer, 12)[0].tolist())
    traces = [TokenTrace(ids[:6], ids[6:9]), TokenTrace(ids[:6], ids[7:12]), TokenTrace(ids[1:4], ids[4:8])]
    apart = scorer.places(padded(traces, scorer.device)).hidden.float()
    try:
        found = scorer.places(layout(traces, scorer.device)).hidden.float()
    except Exception:  # whatever a model raises that was not made for it
        return False
    # by norms: in half precision single numbers differ between two kernels, while a mistake turns the whole state
    away = (found - apart).norm(dim=-1) / apart.norm(dim=-1)
    return bool((away < (0.1 if in_half(scorer) else 1e-3)).all())


def probe_ids(scorer: Scorer, count: int) -> Int[Tensor, "1 T"]:
    """Some ids of the model's vocabulary."""
    return torch.arange(2, 2 + count, device=scorer.device)[None] % scorer.shape.vocab_size


def closeness(scorer: Scorer) -> float:
    """By how much two ways to the same log-probabilities may differ in the precision of the weights."""
    return 1e-2 if in_half(scorer) else 1e-3


def in_half(scorer: Scorer) -> bool:
    """Whether the weights have 16 bits."""
    return next(scorer.model.parameters()).dtype in (torch.bfloat16, torch.float16)
