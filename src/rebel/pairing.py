"""Which completions of a prompt are compared with which. A pair nobody compared (NaN) is never chosen."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def all_pairs(margins: Float[Tensor, "G G"]) -> Int[Tensor, "M 2"]:
    """Every compared pair once: the form with the least variance, at the cost of one log-probability a completion."""
    compared = torch.triu(~margins.isnan(), diagonal=1)
    return compared.nonzero()


def best_against_worst(margins: Float[Tensor, "G G"]) -> Int[Tensor, "M 2"]:
    """The completion of the highest mean margin against that of the lowest: the paper's large-batch pairs."""
    standing = margins.nanmean(dim=1).nan_to_num(nan=0.0)
    best, worst = int(standing.argmax()), int(standing.argmin())
    if best == worst:  # no difference at all: a target of zero still holds the pair together
        best, worst = 0, len(margins) - 1
    pair = torch.tensor([[best, worst]], device=margins.device)
    return pair[~margins[pair[:, 0], pair[:, 1]].isnan()]


def random_pairs(margins: Float[Tensor, "G G"]) -> Int[Tensor, "M 2"]:
    """Disjoint pairs (1, 2), (3, 4), ... in the order of drawing, which is random; with G = 2 the paper's pairs."""
    left = torch.arange(0, len(margins) - 1, 2, device=margins.device)
    pairs = torch.stack([left, left + 1], dim=1)
    return pairs[~margins[pairs[:, 0], pairs[:, 1]].isnan()]
