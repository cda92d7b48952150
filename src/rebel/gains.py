"""What each stretch of a completion brought, by the rewards of what was written until then.

How much the reward of a beginning says of the reward of the whole is found by least squares, so beginnings whose reward
says nothing count for nothing: then all is brought by the last stretch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.types import Scored


def credited(groups: Sequence[Scored]) -> list[Scored]:
    """The groups with the gains of their stretches, where the rewards of beginnings are known.

    The reward that is to be expected after k stretches is the group's mean and, of the difference in reward between
    this beginning and the group's, the share that least squares over all groups finds in the rewards of whole
    completions. A completion that has ended is worth its reward.
    """
    if not groups or any(group.beginnings is None for group in groups):
        return list(groups)
    shares = [least_squares(*column) for column in columns(groups)]
    return [replace(group, gains=gains(group, torch.tensor(shares))) for group in groups]


def columns(groups: Sequence[Scored]) -> list[tuple[Float[Tensor, " N"], Float[Tensor, " N"]]]:
    """For each number of stretches: rewards of beginnings and of whole completions, both less their group's mean."""
    ended = torch.cat([values(group).isnan() for group in groups])
    early = torch.cat([centred(worth(group)) for group in groups])
    late = torch.cat([centred(rewards(group)) for group in groups])
    return [(early[~ended[:, k], k], late[~ended[:, k]]) for k in range(early.shape[1])]


def least_squares(x: Float[Tensor, " N"], y: Float[Tensor, " N"]) -> float:
    """The factor of x that comes closest to y; 0 where x never differs."""
    square = float(x.square().sum())
    return float((x * y).sum()) / square if square > 0 else 0.0


def gains(group: Scored, shares: Float[Tensor, " K"]) -> Float[Tensor, "G C"]:
    """What each stretch changed in the reward that was to be expected."""
    reward = rewards(group)
    expected = reward.mean() + shares.to(reward) * centred(worth(group))
    expected = torch.where(values(group).isnan(), reward[:, None], expected)
    before = torch.cat([reward.mean().expand(len(reward), 1), expected], dim=1)
    after = torch.cat([expected, reward[:, None]], dim=1)
    return after - before


def worth(group: Scored) -> Float[Tensor, "G K"]:
    """The reward of what is written by then: of a completion that has ended, the whole."""
    return torch.where(values(group).isnan(), rewards(group)[:, None], values(group))


def values(group: Scored) -> Float[Tensor, "G K"]:
    assert group.beginnings is not None, "beginnings were scored"
    return group.beginnings.to(rewards(group))


def rewards(group: Scored) -> Float[Tensor, " G"]:
    assert group.rewards is not None, "a judge of pairs gives no rewards of beginnings"
    return group.rewards


def centred(numbers: Float[Tensor, "G *C"]) -> Float[Tensor, "G *C"]:
    """Less the mean over the group."""
    return numbers - numbers.mean(dim=0)
