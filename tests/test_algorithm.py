"""The method's identities, in float64: learning curves do not test mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rebel.algorithm import (
    collate,
    explained,
    rebel_loss,
    regress,
    regression_batch,
    residuals,
    step_size,
    trace_weights,
)
from rebel.pairing import all_pairs, best_against_worst, random_pairs
from rebel.types import Completion, Prompt, RegressionBatch, Rollout, Scored

F64 = torch.float64
SETTINGS = [(1.0, 0.0), (10.0, 0.0), (0.3, 0.7), (5.0, 0.05), (math.inf, 0.5)]


def group(rewards: Tensor, margins: bool = False) -> Scored:
    rollout = Rollout(Prompt("x"), tuple(Completion(str(i), i) for i in range(len(rewards))))
    if margins:
        return Scored(rollout, margins=rewards[:, None] - rewards[None, :])
    return Scored(rollout, rewards=rewards)


def problem(sizes: list[int], beta: float = 0.0, pairing=all_pairs) -> tuple[list[Scored], RegressionBatch, Tensor]:
    """Ragged groups with random rewards, anchors and references; the shaped rewards beside them."""
    groups, batches, shaped = [], [], []
    for size in sizes:
        rewards, anchor, reference = (torch.randn(size, dtype=F64) for _ in range(3))
        groups.append(group(rewards))
        batches.append(regression_batch(groups[-1], pairing, anchor, reference, beta, len(sizes)))
        shaped.append(rewards - beta * (anchor - reference))
    return groups, collate(batches), torch.cat(shaped)


@pytest.mark.parametrize(("eta", "beta"), SETTINGS)
def test_at_the_anchor_the_loss_is_the_mean_squared_margin_and_the_gradient_is_rloo(eta: float, beta: float) -> None:
    sizes = [4, 4, 4]
    _, batch, shaped = problem(sizes, beta)
    step = step_size(eta, beta)
    logp = batch.anchor_logp.clone().requires_grad_()
    loss = rebel_loss(logp, batch, step)
    assert loss.item() == pytest.approx(batch.margin.square().mean().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(step * loss, logp)
    rloo = torch.cat([-4 / (len(r) - 1) * (r - r.mean()) for r in shaped.split(sizes)]) / len(sizes)
    torch.testing.assert_close(gradient, rloo, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_loss_of_all_pairs_is_twice_the_unbiased_variance_of_the_residual(size: int) -> None:
    _, batch, shaped = problem([size], beta=0.2)
    step = step_size(3.0, 0.2)
    logp = torch.randn(size, dtype=F64)
    residual = (logp - batch.anchor_logp) / step - shaped
    assert rebel_loss(logp, batch, step).item() == pytest.approx(2 * residual.var().item(), rel=1e-12)
    mean_free = 4 / (size - 1) * (residual - residual.mean())
    torch.testing.assert_close(trace_weights(logp, batch, step), mean_free, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pairing", [all_pairs, best_against_worst, random_pairs])
def test_trace_weights_are_the_gradient_of_the_scaled_loss(pairing) -> None:
    _, batch, _ = problem([2, 5, 3, 8], beta=0.1, pairing=pairing)
    step = step_size(2.0, 0.1)
    logp = torch.randn(18, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(step * rebel_loss(logp, batch, step), logp)
    torch.testing.assert_close(trace_weights(logp.detach(), batch, step), gradient, rtol=1e-11, atol=1e-12)


def test_every_prompt_counts_once_whatever_its_group_size() -> None:
    groups, batch, _ = problem([2, 7, 4])
    logp = torch.randn(13, dtype=F64)
    parts = zip(groups, logp.split([2, 7, 4]), batch.anchor_logp.split([2, 7, 4]), strict=True)
    alone = [rebel_loss(own, regression_batch(g, all_pairs, anchor), 1.5) for g, own, anchor in parts]
    torch.testing.assert_close(rebel_loss(logp, batch, 1.5), torch.stack(alone).mean())
    assert batch.weight.sum().item() == pytest.approx(1.0)


def test_a_shift_of_all_rewards_of_one_prompt_changes_nothing() -> None:
    rewards, logp = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)
    anchor = torch.randn(5, dtype=F64)
    one, other = (regression_batch(group(r), all_pairs, anchor) for r in (rewards, rewards + 17.0))
    torch.testing.assert_close(trace_weights(logp, one, 2.0), trace_weights(logp, other, 2.0))


def test_margins_and_rewards_are_the_same_regression() -> None:
    rewards, anchor, reference = (torch.randn(4, dtype=F64) for _ in range(3))
    given = [regression_batch(group(rewards, m), all_pairs, anchor, reference, 0.3) for m in (False, True)]
    torch.testing.assert_close(given[0].margin, given[1].margin)


def test_a_pair_nobody_compared_is_left_out() -> None:
    margins = group(torch.tensor([0.0, 1.0, 5.0], dtype=F64), margins=True).margins
    margins[0, 2] = margins[2, 0] = torch.nan
    scored = Scored(group(torch.zeros(3)).rollout, margins=margins)
    batch = regression_batch(scored, all_pairs, torch.zeros(3, dtype=F64))
    assert batch.pairs.tolist() == [[0, 1], [1, 2]]
    assert batch.margin.tolist() == [-1.0, -4.0]


# -- a tabular softmax policy, where the regression can be solved exactly -------------------------------------------


def exact_step(logits: Tensor, reference: Tensor, rewards: Tensor, eta: float, beta: float, kl: str) -> Tensor:
    """The minimiser of the loss over all answers, by least squares on the log-policy (up to its free constant)."""
    anchor = logits.log_softmax(-1)
    batch = regression_batch(group(rewards), all_pairs, anchor, reference, beta)
    step = step_size(eta, beta, kl)
    size = len(logits)
    # residuals are affine in log pi: A log_pi - b; the constant direction is fixed by the normalisation
    offset = residuals(torch.zeros(size, dtype=F64), batch, step)
    columns = [residuals(unit, batch, step) - offset for unit in torch.eye(size, dtype=F64)]
    solution = torch.linalg.lstsq(torch.stack(columns, dim=1), -offset[:, None], driver="gelsd").solution[:, 0]
    return solution.log_softmax(-1)


@pytest.mark.parametrize(("eta", "beta"), SETTINGS)
def test_exact_minimiser_is_mirror_descent(eta: float, beta: float) -> None:
    logits, reference, rewards = (torch.randn(6, dtype=F64) for _ in range(3))
    anchor, reference = logits.log_softmax(-1), reference.log_softmax(-1)
    step = step_size(eta, beta)
    keep = 0.0 if math.isinf(eta) else step / eta
    expected = (keep * anchor + step * beta * reference + step * rewards).log_softmax(-1)
    torch.testing.assert_close(exact_step(logits, reference, rewards, eta, beta, "proximal"), expected)


def test_iterated_from_uniform_the_gap_to_the_best_reward_is_at_most_log_y_over_eta_t() -> None:
    rewards, eta = torch.rand(50, dtype=F64), 0.7
    log_pi = torch.zeros(50, dtype=F64).log_softmax(-1)
    for t in range(1, 200):
        log_pi = exact_step(log_pi, log_pi, rewards, eta, 0.0, "proximal")
        gap = rewards.max() - (log_pi.exp() * rewards).sum()
        assert gap <= math.log(50) / (eta * t) + 1e-9


@pytest.mark.parametrize(("eta", "beta"), [(0.3, 0.7), (5.0, 0.5), (100.0, 1.0)])
def test_the_log_ratio_error_contracts_by_the_stated_factor(eta: float, beta: float) -> None:
    log_pi, reference, rewards = (torch.randn(6, dtype=F64) for _ in range(3))
    log_pi, reference = log_pi.log_softmax(-1), reference.log_softmax(-1)
    target = (reference + rewards / beta).log_softmax(-1)

    def error(now: Tensor) -> Tensor:
        off = now - target
        return (off - off.mean()).norm()

    before = error(log_pi)
    after = error(exact_step(log_pi, reference, rewards, eta, beta, "proximal"))
    assert (after / before).item() == pytest.approx(1 / (1 + eta * beta), rel=1e-6)


def test_shaped_kl_has_the_same_fixed_point_and_diverges_beyond_eta_beta_two() -> None:
    reference = torch.randn(6, dtype=F64).log_softmax(-1)
    rewards = torch.randn(6, dtype=F64)
    target = (reference + rewards / 0.5).log_softmax(-1)
    for eta, converges in ((1.0, True), (3.9, True), (4.1, False)):
        log_pi = reference + 0.01 * torch.randn(6, dtype=F64)
        start = (log_pi - target).std()
        for _ in range(300):
            log_pi = exact_step(log_pi, reference, rewards, eta, 0.5, "shaped")
        assert ((log_pi - target).std() < start * 1e-3) == converges


def test_one_gauss_newton_step_is_the_natural_policy_gradient_step() -> None:
    """All answers weighted by pi_t: pairs of two draws of pi_t have twice the Fisher matrix and gradient of one."""
    logits, rewards, eta = torch.randn(5, dtype=F64), torch.randn(5, dtype=F64), 0.8
    pi = logits.softmax(-1)
    batch = regression_batch(group(rewards), all_pairs, logits.log_softmax(-1))
    chance = 2 * pi[batch.pairs[:, 0]] * pi[batch.pairs[:, 1]]
    batch = RegressionBatch(batch.traces, batch.anchor_logp, batch.pairs, batch.margin, chance)

    def residual(theta: Tensor) -> Tensor:
        return chance.sqrt() * residuals(theta.log_softmax(-1), batch, eta)

    jacobian = torch.autograd.functional.jacobian(residual, logits)
    newton = -torch.linalg.pinv(jacobian, rtol=1e-10) @ residual(logits)
    scores = torch.eye(5, dtype=F64) - pi  # row y: grad log pi(y)
    fisher = scores.T @ (pi[:, None] * scores)
    gradient = scores.T @ (pi * (rewards - (pi * rewards).sum()))
    torch.testing.assert_close(newton, eta * torch.linalg.pinv(fisher, rtol=1e-10) @ gradient)


# -- regress ---------------------------------------------------------------------------------------------------


def test_regress_takes_the_first_minibatch_as_its_own_anchor_and_keeps_it_for_later_passes() -> None:
    groups = [group(torch.randn(3, dtype=F64)) for _ in range(4)]
    theta = {i: torch.randn(3, dtype=F64) for i in range(4)}
    start = {i: logp.clone() for i, logp in theta.items()}
    minibatches = [[0, 1], [2, 3], [3, 0]]
    order = iter(minibatches)

    def update(traces, weigh) -> Tensor:
        chosen = next(order)
        logp = torch.cat([theta[i] for i in chosen])
        pull = weigh(range(len(chosen)), logp)
        for i, own in zip(chosen, pull.split(3), strict=True):
            theta[i] = theta[i] - 0.1 * own
        return logp

    anchor = {2: start[2], 3: start[3]}
    fits = list(
        regress(groups, minibatches, update, pairing=all_pairs, step=2.0, anchor=anchor, reference={}, beta=0.0)
    )
    assert [fit.fresh for fit in fits] == [True, True, False]
    for i in range(4):
        torch.testing.assert_close(anchor[i], start[i])
    torch.testing.assert_close(fits[2].batch.anchor_logp, torch.cat([start[3], start[0]]))
    residual, total = explained(fits[0].logp, fits[0].batch, 2.0).tolist()
    assert residual == pytest.approx(total)


@pytest.mark.parametrize(("pairing", "count"), [(all_pairs, 6), (best_against_worst, 1), (random_pairs, 2)])
def test_pairings_choose_as_many_pairs_as_they_say(pairing, count: int) -> None:
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.1])
    pairs = pairing(rewards[:, None] - rewards[None, :])
    assert len(pairs) == count
    assert all(left != right for left, right in pairs.tolist())
    if count == 1:
        assert pairs.tolist() == [[2, 1]]


def test_best_against_worst_of_equal_rewards_is_still_a_pair() -> None:
    assert len(best_against_worst(torch.zeros(3, 3))) == 1
