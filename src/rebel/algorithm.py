"""REBEL: reinforcement learning by regressing relative rewards (Gao et al., NeurIPS 2024, arXiv 2404.16767).

For a prompt x with completions y_1..y_G, the policy pi_t at the start of the iteration (the anchor) and the
initial policy pi_ref:

    r~_i   = r_i - beta * [log pi_t(y_i|x) - log pi_ref(y_i|x)]     rewards, with the price of leaving pi_ref
    1/eta' = 1/eta + beta                                           the step, never longer than 1/beta
    e_i    = [log pi_theta(y_i|x) - log pi_t(y_i|x)] / eta' - r~_i  residual of the regression
    loss   = mean over prompts of the mean over pairs (i, j) of (e_i - e_j)^2

with the exact minimiser pi(y|x) proportional to pi_t(y|x) * exp(eta' * r~(x, y)): mirror descent.

Spellings of eta. The paper's loss, and this one, is (D / eta - R)^2 with D the difference of log-ratios and R that
of rewards; a large eta is a long step. The authors' code for language models minimises (D - eta * R)^2, which is
eta^2 times the paper's loss; their code for images minimises (rebel_lr * D - R)^2, so rebel_lr = 1 / eta, with D a
mean over the latent dimensions where it is a sum here. What is back-propagated here is eta' * loss: its gradient at
the anchor does not depend on eta.

Columns. Log-probabilities have shape (N,): one regression, of the whole trajectory, which is the paper's. Or they have
shape (N, C), the steps of a trajectory: then every step has a regression of its own onto the same margins, with C times
its log-ratio for that of the trajectory, and the loss is the mean over steps. By Jensen's inequality it is at least the
trajectory's loss at the same eta, and zero only where that is zero too. It is not the paper's.

Stretches. Where it is known what each of C stretches of a trajectory changed in the expected reward (its gain), every
stretch is regressed onto what it brought, and the loss is the sum over stretches:

    d_k  = gain_k - beta * [log pi_t - log pi_ref] of stretch k
    r~_k = d_k + lam * d_{k+1} + lam^2 * d_{k+2} + ...      what stretch k is credited with (GAE, arXiv 1506.02438)

At lam = 1 the gradient at the anchor has the same expectation as that of whole trajectories, if the gains are changes
of some function of what was written so far that was not fitted to the trajectory itself; it has less noise if that
function knows something. Below 1, less of what came later counts, for a bias as large as the gains are wrong. The
quadratic part of both losses has the same expectation to second order, since log-ratios of two stretches are
uncorrelated under pi_t. It is not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.types import Pairing, RegressionBatch, Scored, Trace

Weigh = Callable[[Sequence[int], Float[Tensor, "N *C"]], Float[Tensor, "N *C"]]
"""The pull on each trace of some groups of a minibatch, given by their places in it, at their log-probabilities."""

Update = Callable[[Sequence[Sequence[Trace]], Weigh], Float[Tensor, "N *C"]]
"""One optimiser step along sum(c * grad logp); returns the log-probabilities from before the step."""

Objective = Callable[[Float[Tensor, "G *C"], RegressionBatch, float], Float[Tensor, "G *C"]]
"""c of one prompt's completions, at their log-probabilities and the step eta'. REBEL's is `trace_weights`."""


def step_size(eta: float, beta: float, kl: str = "proximal") -> float:
    """eta', the step in nats per unit of reward. `kl="shaped"` keeps eta, as the authors' code does."""
    if kl == "shaped":
        return eta
    return 1.0 / (1.0 / eta + beta)


def regression_batch(
    scored: Scored[Trace],
    pairing: Pairing,
    anchor_logp: Float[Tensor, "G *C"],
    reference_logp: Float[Tensor, "G *C"] | None = None,
    beta: float = 0.0,
    prompts: int = 1,
    lam: float = 1.0,
) -> RegressionBatch[Trace]:
    """The regression problem of one prompt among `prompts`, every one of which counts the same."""
    margins = scored.pair_margins().to(anchor_logp)
    pairs = pairing(margins)
    left, right = pairs.unbind(dim=1)
    price = beta * (anchor_logp - reference_logp) if reference_logp is not None and beta else None
    if scored.gains is None:
        margin, columns = margins[left, right], 1
        if price is not None:
            margin = margin - (total(price)[left] - total(price)[right])
    else:
        gains = scored.gains.to(anchor_logp)
        brought = to_come(gains if price is None else gains - price, lam)
        columns = brought.shape[1]
        margin = columns * (brought[left] - brought[right])
    weight = anchor_logp.new_full((len(pairs),), 1.0 / (prompts * columns * max(len(pairs), 1)))
    return RegressionBatch(tuple(scored.rollout.traces), anchor_logp, pairs, margin, weight)


def to_come(gains: Float[Tensor, "G C"], lam: float) -> Float[Tensor, "G C"]:
    """Of every stretch its own gain and those after it, each stretch later counting `lam` times as much."""
    found = gains.clone()
    for column in range(gains.shape[1] - 2, -1, -1):
        found[:, column] += lam * found[:, column + 1]
    return found


def collate(batches: Sequence[RegressionBatch[Trace]]) -> RegressionBatch[Trace]:
    """Join prompts into one batch, shifting each one's pair indices past the traces before it."""
    sizes = [len(batch.traces) for batch in batches]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return RegressionBatch(
        traces=tuple(trace for batch in batches for trace in batch.traces),
        anchor_logp=torch.cat([batch.anchor_logp for batch in batches]),
        pairs=torch.cat([batch.pairs + start for batch, start in zip(batches, starts, strict=True)]),
        margin=torch.cat([batch.margin for batch in batches]),
        weight=torch.cat([batch.weight for batch in batches]),
    )


def total(logp: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
    """log pi(y|x) of whole trajectories: the sum of their columns."""
    return logp.flatten(1).sum(dim=1) if logp.ndim > 1 else logp


def mean_column(values: Float[Tensor, "M *C"]) -> Float[Tensor, " M"]:
    return values.flatten(1).mean(dim=1) if values.ndim > 1 else values


def residuals(logp: Float[Tensor, "N *C"], batch: RegressionBatch, step: float) -> Float[Tensor, "M *C"]:
    """e_i - e_j of every pair: how far the policy's log-ratios are from explaining the margins."""
    log_ratio = (logp - batch.anchor_logp) * math.prod(logp.shape[1:])
    left, right = batch.pairs.unbind(dim=1)
    return (log_ratio[left] - log_ratio[right]) / step - along(batch.margin, logp)


def along(values: Float[Tensor, "M *D"], logp: Float[Tensor, "N *C"]) -> Float[Tensor, "M *C"]:
    """The values as they are, if every column of `logp` has its own, else the same for each."""
    if values.ndim == logp.ndim:
        return values
    return values.reshape(-1, *[1] * (logp.ndim - 1)).expand(-1, *logp.shape[1:])


def rebel_loss(logp: Float[Tensor, "N *C"], batch: RegressionBatch, step: float) -> Float[Tensor, ""]:
    """The paper's loss (its equation 9 up to the choice of pairs), in squared units of the reward."""
    return (batch.weight * mean_column(residuals(logp, batch, step).square())).sum()


def trace_weights(logp: Float[Tensor, "N *C"], batch: RegressionBatch, step: float) -> Float[Tensor, "N *C"]:
    """c with d(eta' * loss)/d theta = sum_i c_i * grad log pi_theta(y_i|x).

    For all pairs of one prompt c_i = 4 / (G - 1) * (e_i - mean e). As numbers they let every trace be
    back-propagated by itself: no pair has to share a micro-batch. The C of the mean over columns and the C in a
    column's residual cancel.
    """
    pull = 2.0 * along(batch.weight, logp) * residuals(logp, batch, step)
    left, right = batch.pairs.unbind(dim=1)
    return torch.zeros_like(logp).index_add(0, left, pull).index_add(0, right, -pull)


def explained(logp: Float[Tensor, "N *C"], batch: RegressionBatch, step: float) -> Float[Tensor, " 2"]:
    """(residual, total) sums of squares of the regression; R^2 = 1 - residual / total once pooled over prompts."""
    residual = batch.weight * mean_column(residuals(logp, batch, step).square())
    return torch.stack([residual.sum(), (batch.weight * mean_column(batch.margin.square())).sum()])


@dataclass(frozen=True, slots=True)
class Fit:
    """What one optimiser step saw before it moved: its groups, their regression and log-probabilities."""

    groups: tuple[int, ...]
    batch: RegressionBatch
    logp: Float[Tensor, "N *C"]
    fresh: bool


def regress(
    groups: Sequence[Scored[Trace]],
    minibatches: Sequence[Sequence[int]],
    update: Update,
    *,
    pairing: Pairing,
    step: float,
    beta: float = 0.0,
    anchor: dict[int, Float[Tensor, "G *C"]],
    reference: Mapping[int, Float[Tensor, "G *C"]],
    objective: Objective = trace_weights,
    lam: float = 1.0,
) -> Iterator[Fit]:
    """theta_{t+1} = argmin of the loss: one optimiser step for each minibatch of whole groups, in their order.

    `anchor` holds log pi_t of the groups by index. The first minibatch needs none: there log pi_theta is log pi_t,
    and it is noted down for later passes.
    """
    seen: set[int] = set()
    for chosen in minibatches:

        def problems(
            places: Sequence[int], logp: Tensor, chosen: Sequence[int] = chosen
        ) -> list[tuple[RegressionBatch, Tensor]]:
            members = [chosen[place] for place in places]
            now = logp.split([len(groups[i].rollout.completions) for i in members])
            return [
                (
                    regression_batch(groups[i], pairing, anchor.get(i, own), reference.get(i), beta, len(chosen), lam),
                    own,
                )
                for i, own in zip(members, now, strict=True)
            ]

        def weigh(places: Sequence[int], logp: Tensor, problems: Callable = problems) -> Tensor:
            return torch.cat([objective(own, batch, step) for batch, own in problems(places, logp)])

        logp = update([groups[i].rollout.traces for i in chosen], weigh)
        whole = collate([batch for batch, _ in problems(range(len(chosen)), logp)])
        sizes = [len(groups[i].rollout.completions) for i in chosen]
        for i, own in zip(chosen, logp.split(sizes), strict=True):
            anchor.setdefault(i, own)
        yield Fit(tuple(chosen), whole, logp, fresh=seen.isdisjoint(chosen))
        seen.update(chosen)
