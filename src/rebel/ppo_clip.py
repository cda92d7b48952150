"""PPO's clipped objective on the steps of a trajectory: DDPO (arXiv 2305.13301), to compare REBEL with.

With A_i the rewards of one prompt's completions, centred and divided by their standard deviation, and the probability
ratio rho_it = exp(log p_theta - log p_t) of step t, the mean over prompts, completions and steps is minimised of
max(-A_i rho_it, -A_i clip(rho_it, 1 - clip, 1 + clip)). Samples, minibatches, passes and optimiser are those of REBEL.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.algorithm import along
from rebel.types import RegressionBatch

EPSILON = 1e-8
"""Added to the standard deviation of the rewards, as DDPO does."""


def ppo_clip(logp: Float[Tensor, "G *C"], batch: RegressionBatch, step: float, clip: float) -> Float[Tensor, "G *C"]:
    """c of one prompt's completions, all of whose pairs are in the batch; there is no step eta in it.

    c_it = -A_i rho_it / (prompts G C), and 0 where the ratio is already beyond the clip in the direction of A_i.
    """
    ratio = (logp - batch.anchor_logp).exp()
    advantage = along(advantages(batch), logp)
    beyond = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    share = float(batch.weight.sum()) / (len(logp) * math.prod(logp.shape[1:]))
    return torch.where(beyond | (advantage == 0), 0.0, -share * advantage * ratio)


def advantages(batch: RegressionBatch) -> Float[Tensor, " G"]:
    """(r~_i - mean) / standard deviation of one prompt, from the margins of all its pairs."""
    left, right = batch.pairs.unbind(dim=1)
    count = len(batch.traces)
    centred = batch.margin.new_zeros(count).index_add(0, left, batch.margin).index_add(0, right, -batch.margin) / count
    return centred / (centred.square().mean().sqrt() + EPSILON)
