"""Scored groups: building them, leaving completions out of them, penalties and scales.

The order in a run: weigh and sum, `penalise_unfinished` or `drop_unfinished`, `scaled`, `usable`. So the penalty is
in the unit of the reward, as TRL's `missing_eos_penalty` is, and counts in the standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rebel.errors import RebelError
from rebel.types import Rollout, Scored

Scale = Literal["none", "group", "batch"]

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it; TRL's value."""


def in_groups(
    rollouts: Sequence[Rollout],
    rewards: Float[Tensor, " N"],
    components: Mapping[str, Float[Tensor, " N"]],
) -> list[Scored]:
    """The rollouts scored, from the rewards of all their completions in a row."""
    sizes = [len(rollout.completions) for rollout in rollouts]
    parts = {name: values.split(sizes) for name, values in components.items()}
    return [
        Scored(rollout, rewards=part, components={name: values[k] for name, values in parts.items()})
        for k, (rollout, part) in enumerate(zip(rollouts, rewards.split(sizes), strict=True))
    ]


def kept(scored: Scored, keep: Bool[Tensor, " G"]) -> Scored | None:
    """The group with only those completions; None where fewer than two are left to compare."""
    where = keep.nonzero().squeeze(1)
    if len(where) < 2:
        return None
    if len(where) == len(keep):
        return scored
    completions = tuple(scored.rollout.completions[k] for k in where.tolist())
    return Scored(
        rollout=replace(scored.rollout, completions=completions),
        rewards=None if scored.rewards is None else scored.rewards[where],
        margins=None if scored.margins is None else scored.margins[where][:, where],
        components={name: values[where] for name, values in scored.components.items()},
        beginnings=None if scored.beginnings is None else scored.beginnings[where],
    )


def usable(scored: Scored) -> Scored | None:
    """The group without the completions that have no finite reward, or no finite margin against any other."""
    if scored.margins is None:
        assert scored.rewards is not None, "a scored rollout has rewards or margins"
        return kept(scored, scored.rewards.isfinite())
    finite = scored.margins.isfinite()
    margins = scored.margins.masked_fill(~finite, torch.nan)
    return kept(replace(scored, margins=margins), finite.fill_diagonal_(False).any(dim=1))


def flat(scored: Scored) -> bool:
    """Whether no two completions of the group differ in reward, so that there is nothing to learn from it."""
    return not bool((scored.pair_margins().nan_to_num(nan=0.0) != 0).any())


def drop_unfinished(scored: Scored) -> Scored | None:
    """The group without the completions that the length limit cut off."""
    return kept(scored, _finished(scored))


def penalise_unfinished(scored: Scored, penalty: float) -> Scored:
    """The group with `penalty` taken from the reward of each completion that the length limit cut off."""
    cost = penalty * (~_finished(scored)).float()
    if scored.margins is not None:
        cost = cost.to(scored.margins)
        return replace(scored, margins=scored.margins - (cost[:, None] - cost[None, :]))
    assert scored.rewards is not None, "a scored rollout has rewards or margins"
    return replace(scored, rewards=scored.rewards - cost.to(scored.rewards))


def scaled(groups: Sequence[Scored], scale: Scale) -> list[Scored]:
    """The groups with rewards divided by their standard deviation over each group, or over all of them together.

    As TRL's `scale_rewards`, but that no mean is subtracted: only differences of rewards count here.
    """
    if scale == "none" or not groups:
        return list(groups)
    rewards = [_rewards(scored, scale) for scored in groups]
    if scale == "group":
        units = [_unit(values) for values in rewards]
    else:
        units = [_unit(torch.cat(rewards))] * len(rewards)
    return [
        replace(
            scored,
            rewards=values / unit,
            beginnings=None if scored.beginnings is None else scored.beginnings / unit,
        )
        for scored, values, unit in zip(groups, rewards, units, strict=True)
    ]


def _finished(scored: Scored) -> Bool[Tensor, " G"]:
    return torch.tensor([completion.finished for completion in scored.rollout.completions], dtype=torch.bool)


def _rewards(scored: Scored, scale: str) -> Float[Tensor, " G"]:
    if scored.rewards is None:
        raise RebelError(f"--scale_rewards {scale} divides rewards, and a judge of pairs gives none; use none")
    return scored.rewards


def _unit(rewards: Float[Tensor, " N"]) -> float:
    """What to divide by. Equal rewards stay as they are: their differences are zero in any unit."""
    finite = rewards[rewards.isfinite()].double()
    if len(finite) < 2 or finite.min() == finite.max():
        return 1.0
    return float(finite.std()) + EPSILON
