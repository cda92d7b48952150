"""Credit per step and PPO's objective: what their weights are the gradients of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rebel.algorithm import explained, rebel_loss, regress, regression_batch, total, trace_weights
from rebel.credit import Known, spread, step, trajectory
from rebel.pairing import all_pairs
from rebel.ppo_clip import advantages, ppo_clip
from rebel.types import Completion, Prompt, RegressionBatch, Rollout, Scored

G, S = 5, 4
ETA = 3.0


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group(seed: int = 0, size: int = G) -> Scored:
    rollout = Rollout(Prompt("x"), tuple(Completion("y", k) for k in range(size)))
    return Scored(rollout, rewards=randn(size, seed=seed))


def batch(columns: Any = (S,), prompts: int = 1, **more: Any) -> RegressionBatch:
    return regression_batch(group(), all_pairs, randn(G, *columns, seed=1), prompts=prompts, **more)


def near(problem: RegressionBatch) -> Tensor:
    """Log-probabilities of a policy that has moved."""
    moved = problem.anchor_logp + 0.4 * randn(*problem.anchor_logp.shape, seed=2)
    return moved.requires_grad_()


def test_the_weights_of_every_step_are_the_gradient_of_its_loss() -> None:
    problem = batch()
    logp = near(problem)
    (ETA * rebel_loss(logp, problem, ETA)).backward()
    torch.testing.assert_close(trace_weights(logp.detach(), problem, ETA), logp.grad)


def test_one_step_is_the_trajectory() -> None:
    problem, one = batch(()), batch((1,))
    logp = near(problem).detach()
    torch.testing.assert_close(trace_weights(logp[:, None], one, ETA)[:, 0], trace_weights(logp, problem, ETA))
    torch.testing.assert_close(explained(logp[:, None], one, ETA), explained(logp, problem, ETA))


def test_the_loss_of_the_steps_is_the_trajectory_s_and_the_spread_around_it() -> None:
    """Jensen: never below, and equal where all steps move alike, at the same eta."""
    problem, whole = batch(), batch(())
    logp = near(problem).detach()
    moved = total(logp - problem.anchor_logp)
    assert float(rebel_loss(logp, problem, ETA)) > float(rebel_loss(whole.anchor_logp + moved, whole, ETA))
    alike = problem.anchor_logp + moved[:, None] / S
    torch.testing.assert_close(
        rebel_loss(alike, problem, ETA), rebel_loss(whole.anchor_logp + moved, whole, ETA), rtol=1e-9, atol=1e-12
    )


def test_at_the_anchor_the_weights_of_steps_and_trajectory_are_the_same() -> None:
    """So the first step of an iteration does not know the difference, nor eta."""
    problem, whole = batch(), batch(())
    expected = trace_weights(whole.anchor_logp, whole, ETA)
    for eta in (ETA, 50.0):
        found = trace_weights(problem.anchor_logp, problem, eta)
        torch.testing.assert_close(found, expected[:, None].expand(-1, S))


def test_the_price_of_the_kl_is_that_of_the_whole_path() -> None:
    anchor, reference = randn(G, S, seed=1), randn(G, S, seed=7)
    steps = regression_batch(group(), all_pairs, anchor, reference, beta=0.3)
    whole = regression_batch(group(), all_pairs, anchor.sum(1), reference.sum(1), beta=0.3)
    torch.testing.assert_close(steps.margin, whole.margin)


def test_credits_and_their_transposes() -> None:
    logp, c = randn(G, S, seed=3), randn(G, seed=4)
    assert torch.equal(trajectory(logp), logp.sum(dim=1)) and step(logp) is logp
    for columns, weights in ((trajectory, c), (step, randn(G, S, seed=5))):
        assert float((weights * columns(logp)).sum()) == pytest.approx(float((spread(weights, S) * logp).sum()))
        assert torch.equal(Known(weights)(logp), spread(weights, S))


# -- PPO ------------------------------------------------------------------------------------------------------------


def clipped(logp: Tensor, problem: RegressionBatch, clip: float) -> Tensor:
    """The objective as it is written down."""
    rewards = group().rewards
    advantage = ((rewards - rewards.mean()) / rewards.std(correction=0))[:, None]
    ratio = (logp - problem.anchor_logp).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()


@pytest.mark.parametrize("clip", [0.05, 0.3])
def test_ppo_s_weights_are_the_gradient_of_its_objective(clip: float) -> None:
    problem = batch(prompts=1)
    logp = near(problem)
    clipped(logp, problem, clip).backward()
    found = ppo_clip(logp.detach(), problem, ETA, clip)
    torch.testing.assert_close(found, logp.grad, rtol=1e-6, atol=1e-9)
    assert 0 < int((found == 0).sum()) < G * S, "some are clipped and some are not"


def test_ppo_counts_every_prompt_once() -> None:
    one, three = batch(prompts=1), batch(prompts=3)
    logp = near(one).detach()
    torch.testing.assert_close(ppo_clip(logp, three, ETA, 0.2) * 3, ppo_clip(logp, one, ETA, 0.2))


def test_advantages_are_standardised_and_zero_where_all_rewards_are_equal() -> None:
    found = advantages(batch())
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.std(correction=0)) == pytest.approx(1, rel=1e-6)
    flat = Scored(group().rollout, rewards=torch.ones(G, dtype=torch.float64))
    problem = regression_batch(flat, all_pairs, randn(G, S, seed=1))
    assert not ppo_clip(near(problem).detach(), problem, ETA, 0.2).any()


def test_regress_takes_another_objective_and_calls_it_for_each_prompt() -> None:
    groups = [group(0, 4), group(1, 3)]
    asked: list[int] = []

    def objective(logp: Tensor, one: RegressionBatch, eta: float) -> Tensor:
        asked.append(len(one.traces))
        return ppo_clip(logp, one, eta, 0.2)

    def update(traces: Any, weigh: Any) -> Tensor:
        logp = randn(7, S, seed=9)
        assert weigh([0, 1], logp).shape == (7, S)
        return logp

    (found,) = regress(
        groups, [[0, 1]], update, pairing=all_pairs, step=ETA, anchor={}, reference={}, objective=objective
    )
    assert asked == [4, 3] and found.logp.shape == (7, S)
