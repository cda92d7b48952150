"""What each stretch of a completion brought, by the rewards of what was written until then.

How much the reward of a beginning says of the reward of the whole is found by least squares, so beginnings whose reward
says nothing count for nothing: then all is brought by the last stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rebel.types import Scored

ROUNDING = 1e-9
"""A sum of squares below this share of that of all groups is none."""


def credited(groups: Sequence[Scored]) -> list[Scored]:
    """The groups with the gains of their stretches, where the rewards of beginnings are known.

    The reward that is to be expected after k stretches is the group's mean and, of the difference in reward between
    this beginning and the others of the group, the share that least squares over the *other* groups finds in the
    rewards of whole completions. So what a completion is credited with does not hang on its own fit. A completion that
    has ended is worth its reward.
    """
    if all(group.beginnings is None for group in groups):
        return list(groups)
    sums = torch.stack([products(group) for group in groups])
    of_all = sums.sum(dim=0)
    both, square = (of_all - sums).unbind(dim=1)
    some = square > ROUNDING * of_all[1]
    shares = torch.where(some, both / square.where(some, torch.ones_like(square)), 0.0)
    return [replace(group, gains=gains(group, share)) for group, share in zip(groups, shares, strict=True)]


def products(group: Scored) -> Float[Tensor, "2 K"]:
    """Of the completions that go on after k stretches, sums of early * late and of early^2, each less its mean."""
    open_still, early = going_on(group), known_so_far(group).double()
    late = centred(rewards(group).double()[:, None].expand_as(early), open_still)
    return torch.stack([(early * late).sum(dim=0), early.square().sum(dim=0)])


def gains(group: Scored, shares: Float[Tensor, " K"]) -> Float[Tensor, "G C"]:
    """What each stretch changed in the reward that was to be expected."""
    reward, early = rewards(group), known_so_far(group)
    expected = torch.where(going_on(group), reward.mean() + shares.to(reward) * early, reward[:, None])
    before = torch.cat([reward.mean().expand(len(reward), 1), expected], dim=1)
    after = torch.cat([expected, reward[:, None]], dim=1)
    return after - before


def known_so_far(group: Scored) -> Float[Tensor, "G K"]:
    """By how much the reward of a beginning differs from those of the group that go on as well."""
    return centred(beginnings(group).nan_to_num(nan=0.0), going_on(group))


def centred(numbers: Float[Tensor, "G K"], counts: Bool[Tensor, "G K"]) -> Float[Tensor, "G K"]:
    """Less the mean of those of the group that count; the others are 0."""
    mean = (numbers * counts).sum(dim=0) / counts.sum(dim=0).clamp(min=1)
    return (numbers - mean) * counts


def going_on(group: Scored) -> Bool[Tensor, "G K"]:
    """Which completions have not ended after so many stretches."""
    return ~beginnings(group).isnan()


def beginnings(group: Scored) -> Float[Tensor, "G K"]:
    assert group.beginnings is not None, "the beginnings of all groups are scored, or of none"
    return group.beginnings.to(rewards(group))


def rewards(group: Scored) -> Float[Tensor, " G"]:
    assert group.rewards is not None, "a judge of pairs gives no rewards of beginnings"
    return group.rewards


def known_halfway(groups: Sequence[Scored]) -> float | None:
    """Of the variance of rewards within groups, the share that was known after half of a completion's stretches."""
    found = [(group.gains, 1 + going_on(group).sum(dim=1)) for group in groups if group.gains is not None]
    if not found:
        return None
    whole = torch.cat([gains for gains, _ in found])
    half = torch.cat([count for _, count in found]) // 2
    later = torch.arange(whole.shape[1]) >= half[:, None]
    variance = whole.sum(dim=1).square().sum()
    return 1 - float((whole * later).sum(dim=1).square().sum() / variance) if variance else None
