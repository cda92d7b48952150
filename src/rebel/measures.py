"""What an iteration measures about itself: rewards, lengths, the fit of the regression, how far the policy moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rebel.algorithm import Fit, explained, rebel_loss
from rebel.evaluate import length, mean
from rebel.gains import known_halfway
from rebel.rewards.groups import flat
from rebel.types import OWN, Completion, Scored

Measures = dict[str, float]


def of_draws(groups: Sequence[Scored], kept: Sequence[Scored]) -> Measures:
    """Rewards, lengths and what had to be left out.

    Rewards and lengths are those of the policy's own completions; others are beside them, under their source.
    """
    completions = [c for group in groups for c in group.rollout.completions]
    standings = torch.cat([standing(group) for group in groups])
    used = sum(len(group.rollout.completions) for group in kept)
    known = known_halfway(kept)
    sources = {c.source for c in completions}
    found = {source: of_source(source, completions, standings) for source in sorted(sources)}
    apart = {f"{s}/{name}": x for s, own in found.items() for name, x in own.items()} if len(found) > 1 else {}
    return {
        **found[OWN if OWN in found else min(found)],
        **apart,
        "reward_std": mean(float(standing(group).std()) for group in kept),
        **components(groups),
        "flat_groups": mean(float(flat(group)) for group in kept),
        **({} if known is None else {"known_halfway": known}),
        "dropped_completions": float(len(completions) - used),
        "failed_rewards": float(standings.isnan().sum()),
        "dropped_groups": float(len(groups) - len(kept)),
    }


def of_source(source: str, completions: Sequence[Completion], standings: Float[Tensor, " N"]) -> Measures:
    """Reward and length of the completions of one source."""
    chosen = [k for k, c in enumerate(completions) if c.source == source]
    lengths = torch.tensor([float(length(completions[k])) for k in chosen])
    of_lengths = {
        "length": float(lengths.mean()),
        "length_reward_correlation": correlation(lengths, standings[chosen]),
    }
    return {
        "reward": float(standings[chosen].nanmean()),
        **(of_lengths if lengths.any() else {}),
        "unfinished": mean(float(not completions[k].finished) for k in chosen),
    }


def log_ratios_of(groups: Sequence[Scored], log_ratios: Sequence[Tensor], name: str) -> Measures:
    """Mean log-ratio of each source's completions, where there is more than one source."""
    found: dict[str, list[float]] = {}
    for group, moved in zip(groups, log_ratios, strict=True):
        for completion, value in zip(group.rollout.completions, moved.tolist(), strict=True):
            found.setdefault(completion.source, []).append(value)
    return {f"{source}/{name}": mean(values) for source, values in sorted(found.items())} if len(found) > 1 else {}


def drawn_by_policy(group: Scored) -> Bool[Tensor, " G"]:
    """Which completions the policy drew itself: over others a mean log-ratio is no KL, and a mean log pi no entropy."""
    return torch.tensor([completion.source == OWN for completion in group.rollout.completions])


def standing(group: Scored) -> Float[Tensor, " G"]:
    """The reward of each completion, or its mean margin over the others where only pairs were compared."""
    return group.rewards if group.rewards is not None else group.pair_margins().nanmean(dim=1)


def components(groups: Sequence[Scored]) -> Measures:
    names = {name: None for group in groups for name in group.components}
    return {
        f"rewards/{name}": float(torch.cat([g.components[name] for g in groups if name in g.components]).nanmean())
        for name in names
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation where both are known; NaN if one of them does not vary."""
    known = ~(x.isnan() | y.isnan())
    x, y = x[known].double(), y[known].double()
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def margin_variance(groups: Iterable[Scored], shaping: Mapping[int, Tensor], beta: float) -> float:
    """Mean variance of r~ within a group; `shaping` has log pi_t - log pi_ref of groups, by index.

    Half the mean square of the margins: for rewards that is their unbiased variance.
    """
    variances = []
    for index, group in enumerate(groups):
        margins = group.pair_margins().double()
        if beta and index in shaping:
            margins = margins - beta * (shaping[index][:, None] - shaping[index][None, :])
        off_diagonal = margins[~torch.eye(len(margins), dtype=torch.bool)]
        variances.append(float(off_diagonal.square().nanmean()) / 2)
    return mean(variances)


def of_fits(fits: Sequence[Fit], step: float) -> Measures:
    """Loss and R^2 of each minibatch before its first step, when it is still unseen: no sample is lost for it.

    What is scored by pi_t itself has nothing to explain it yet and is left out of R^2.
    """
    return {
        "loss": mean(float(rebel_loss(fit.logp, fit.batch, step)) for fit in fits),
        "r2_held_out": r_squared([fit for fit in fits if fit.fresh and not at_anchor(fit)], step),
    }


def at_anchor(fit: Fit) -> bool:
    """Whether the policy that a step saw was pi_t itself."""
    return torch.equal(fit.logp, fit.batch.anchor_logp)


def r_squared(fits: Sequence[Fit], step: float) -> float:
    """1 - residual / total sum of squares, pooled over the groups of several minibatches."""
    if not fits:
        return math.nan
    sums = torch.stack([len(fit.groups) * explained(fit.logp, fit.batch, step) for fit in fits])
    residual, total = sums.sum(dim=0).tolist()
    return 1 - residual / total if total else math.nan


def half_variance(log_ratio: Float[Tensor, " N"]) -> float:
    """KL in nats between two policies from log-ratios of draws of one of them, right to second order."""
    return float(log_ratio.double().var() / 2) if len(log_ratio) > 1 else math.nan


def best_and_worst(groups: Sequence[Scored], log_ratios: Sequence[Tensor]) -> Measures:
    """Mean log-ratio of each group's best and worst completion. Both may fall: only their difference is regressed."""
    pairs = [
        (
            float(moved[standing(group).nan_to_num(-math.inf).argmax()]),
            float(moved[standing(group).nan_to_num(math.inf).argmin()]),
        )
        for group, moved in zip(groups, log_ratios, strict=True)
        if not flat(group)
    ]
    return {
        "logratio_best": mean(best for best, _ in pairs),
        "logratio_worst": mean(worst for _, worst in pairs),
    }
