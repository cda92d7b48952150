"""Preferences that are not transitive, exactly: REBEL's mixture reaches the minimax winner, a fixed reward does not."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from torch import Tensor

from rebel.algorithm import rebel_loss, regression_batch, step_size
from rebel.pairing import all_pairs
from rebel.rewards.judges import TableJudge
from rebel.rewards.winrate import WinRate
from rebel.types import Completion, Prompt, Rollout, Scored

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import games  # the same functions that make the table

INTERIOR = [(0.8, 0.15, 0.05), (0.999, 0.0005, 0.0005), (0.1, 0.3, 0.6)]
TO_THE_CORNER = INTERIOR[:2]
RPS = games.ROCK_PAPER_SCISSORS


def minimised(game: Tensor, policy: Tensor, eta: float) -> Tensor:
    """The next policy: the real loss of all answers with their win rates against the policy, minimised by number."""
    rollout = Rollout(Prompt("x"), tuple(Completion(k, k) for k in range(len(policy))))
    batch = regression_batch(Scored(rollout, rewards=game @ policy), all_pairs, policy.log())
    step = step_size(eta, beta=0.0)
    logits = policy.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = step * rebel_loss(logits.log_softmax(0), batch, step)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("start", INTERIOR)
@pytest.mark.parametrize("eta", [0.1, 2.0])
def test_the_iterates_are_the_minimisers_of_the_loss(start: tuple[float, ...], eta: float) -> None:
    iterates = games.rebel_iterates(RPS, start, eta, 6)
    for before, after in pairwise(iterates):
        torch.testing.assert_close(minimised(RPS, before, eta), after, rtol=1e-6, atol=1e-9)


def test_the_judge_of_the_game_gives_these_win_rates() -> None:
    """Ten completions drawn as the policy says: WinRate is then the game against the policy."""
    table = {(i, j): float(RPS[i, j]) for i in range(3) for j in range(3)}
    drawn = (0,) * 6 + (1,) * 3 + (2,)
    rollout = Rollout(Prompt("x"), tuple(Completion(k, k) for k in drawn))
    (scored,) = WinRate(TableJudge(table, lambda prompt, y: y))([rollout])
    assert scored.rewards is not None
    expected = RPS @ torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(scored.rewards.double(), expected[list(drawn)], atol=1e-7, rtol=0)


@pytest.mark.parametrize("start", INTERIOR)
def test_the_mixture_of_iterates_reaches_uniform_and_the_last_one_goes_round(start: tuple[float, ...]) -> None:
    iterates = games.rebel_iterates(RPS, start, games.ETA, games.ITERATIONS)
    assert games.distance_to_uniform(iterates.mean(dim=0)) < 0.02
    assert games.distance_to_uniform(iterates[-1]) > 0.2, "the last iterate is no solution"
    leaders = [int(k) for k in iterates.argmax(dim=1).unique_consecutive()]
    assert len(leaders) > 9, "it goes round and round"
    assert all((b - a) % 3 == 1 for a, b in pairwise(leaders)), "paper follows rock"


@pytest.mark.parametrize("start", TO_THE_CORNER)
def test_the_optimum_of_one_fixed_reward_is_nearly_deterministic(start: tuple[float, ...]) -> None:
    reward = games.bradley_terry(RPS, start)
    optimum = (torch.tensor(start).double().log() + reward / games.BETA).softmax(0)
    assert optimum.max() > 0.99 and games.exploitability(RPS, optimum) > 0.49
    iterates = games.dpo_iterates(RPS, start, games.BETA, games.ITERATIONS)
    torch.testing.assert_close(iterates[-1], optimum, atol=1e-3, rtol=0)
    assert iterates.mean(dim=0).max() > 0.98, "nor does its mean help"


@pytest.mark.parametrize("start", INTERIOR)
def test_the_fixed_reward_is_the_likeliest_of_bradley_and_terry(start: tuple[float, ...]) -> None:
    p = torch.tensor(start).double()
    reward = games.bradley_terry(RPS, start).requires_grad_()
    chance = (reward[:, None] - reward[None, :]).sigmoid()
    likelihood = (p[:, None] * p[None, :] * RPS * chance.log()).sum()
    (slope,) = torch.autograd.grad(likelihood, reward)
    assert float((slope / p).abs().max()) < 1e-7


@pytest.mark.parametrize("start", INTERIOR)
def test_with_a_price_on_the_kl_the_last_iterate_comes_to_rest(start: tuple[float, ...]) -> None:
    eta, beta = 1.0, 0.2
    reference = torch.tensor(start).double().log()
    step, logp = step_size(eta, beta), reference
    for _ in range(2000):
        shaped = RPS @ logp.exp() - beta * (logp - reference)
        before, logp = logp, (logp + step * shaped).log_softmax(0)
    assert float((logp - before).abs().max()) < 1e-9
    resting = (reference + RPS @ logp.exp() / beta).log_softmax(0)
    torch.testing.assert_close(logp, resting, atol=1e-6, rtol=0)


# -- ten models that people preferred in circles --------------------------------------------------------------------


@pytest.fixture(scope="module")
def core() -> Tensor:
    folder = conftest.DATA / "llmfao"
    if not folder.exists():
        pytest.skip(f"the votes are not at {folder}; set REBEL_DATA to the folder that has llmfao/")
    return games.core_matrix(folder)[1]


def test_the_core_matrix_has_its_eight_circles(core: Tensor) -> None:
    torch.testing.assert_close(core + core.T, torch.ones_like(core))
    beats = core > 0.5
    n = len(core)
    circles = [
        (a, b, c)
        for a in range(n)
        for b in range(n)
        for c in range(n)
        if a == min(a, b, c) and beats[a, b] and beats[b, c] and beats[c, a]
    ]
    assert n == 10 and len(circles) == 8


def test_the_mixture_is_a_minimax_winner_of_the_ten_models(core: Tensor) -> None:
    pytest.importorskip("scipy", reason="the minimax winner is found with scipy: pip install scipy")
    winner = games.minimax_winner(core)
    assert games.exploitability(core, winner) < 1e-9
    iterates = games.rebel_iterates(core, [0.1] * 10, games.ETA, games.ITERATIONS)
    mixture = iterates.mean(dim=0)
    assert games.exploitability(core, mixture) < 0.01
    assert float(winner @ core @ mixture) == pytest.approx(0.5, abs=0.01), "neither beats the other"
    deterministic = [games.exploitability(core, one) for one in torch.eye(10, dtype=torch.float64)]
    fixed = (games.bradley_terry(core, [0.1] * 10) / games.BETA).softmax(0)
    assert min(deterministic) > 0.01 and games.exploitability(core, fixed) > 0.1


def test_a_wrong_sign_or_a_lost_half_would_be_seen(core: Any) -> None:
    """The winner of the transposed game loses this one: the tests above are not true of any matrix."""
    assert games.exploitability(core, games.minimax_winner(core.T)) > 0.1
