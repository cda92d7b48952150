"""One optimiser step: its gradient is that of the loss, however the traces are split into micro-batches."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch import Tensor

from rebel.algorithm import Weigh, collate, rebel_loss, regress, regression_batch, trace_weights
from rebel.build.model import build_accelerator
from rebel.config import RebelConfig
from rebel.errors import RunStopped
from rebel.learner import Learner, learner
from rebel.micro_batches import bundles, fill, parts, pieces_of, plan, share
from rebel.pairing import all_pairs, best_against_worst
from rebel.policies.causal_lm import causal_lm
from rebel.types import Completion, Pairing, Prompt, RegressionBatch, Rollout, Scored, TokenTrace
from rebel.way import Moved, divergence, meet, probe

STEP, BETA = 2.5, 0.1
SIZES = (4, 2, 7, 3)


def ragged(seed: int = 0) -> list[Scored]:
    """Groups of different sizes, with completions of different lengths and random rewards."""
    source = random.Random(seed)
    groups = []
    for number, size in enumerate(SIZES):
        start = source.randint(1, 6)
        traces = [tiny.trace(start, source.randint(1, 12), seed=100 * number + k) for k in range(size)]
        rollout = Rollout(Prompt("x"), tuple(Completion("y", trace) for trace in traces))
        rewards = torch.tensor([source.gauss(0, 1) for _ in range(size)], dtype=torch.float64)
        groups.append(Scored(rollout, rewards=rewards))
    return groups


def a_learner(dtype: torch.dtype = torch.float64, rate: float = 1.0, budget: int = 10**6, **settings: float) -> Learner:
    """Plain gradient descent, so that a step is the gradient."""
    policy = causal_lm(tiny.model("llama").to(dtype), tiny.tokenizer(), 0.8)
    return learner(
        Accelerator(cpu=True),
        policy,
        lambda weights: torch.optim.SGD(weights, lr=rate),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        budget=budget,
        **settings,
    )


def problem(groups: Sequence[Scored], pairing: Pairing, learner: Learner) -> tuple[RegressionBatch, Weigh]:
    """A regression whose anchor is not the policy as it is, and its weights for any of the groups."""
    source = torch.Generator().manual_seed(5)

    def near(logp: Tensor) -> Tensor:
        return logp + 0.5 * torch.randn(len(logp), generator=source, dtype=torch.float64)

    parts = []
    for group in groups:
        logp = learner.score(learner.policy.log_prob, group.rollout.traces)
        parts.append(regression_batch(group, pairing, near(logp), near(logp), BETA, len(groups)))

    def weigh(places: Sequence[int], logp: Tensor) -> Tensor:
        return trace_weights(logp, collate([parts[k] for k in places]), STEP)

    return collate(parts), weigh


def gradient(weights_before: list[Tensor], learner: Learner) -> list[Tensor]:
    """What gradient descent at rate 1 has subtracted."""
    return [before - after.detach() for before, after in zip(weights_before, learner.weights, strict=True)]


def copied(learner: Learner) -> list[Tensor]:
    return [weight.detach().clone() for weight in learner.weights]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def traces_of(groups: Sequence[Scored]) -> list[list[TokenTrace]]:
    return [group.rollout.traces for group in groups]


def autograd(dtype: torch.dtype, pairing: Pairing) -> Tensor:
    """The gradient of step * loss, from all traces in one batch."""
    other = a_learner(dtype)
    batch, _ = problem(ragged(), pairing, other)
    logp = other.policy.log_prob(batch.traces)[:, 0].double()
    (STEP * rebel_loss(logp, batch, STEP)).backward()
    return flat([weight.grad for weight in other.weights])


# -- the gradient ---------------------------------------------------------------------------------------------------

BUDGETS = [1, 31, 100, 10**6]
"""Single traces; some groups whole and others split; everything at once."""


@pytest.mark.parametrize("pairing", [all_pairs, best_against_worst])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_gradient_is_that_of_the_loss_whatever_the_micro_batches(
    pairing: Pairing, dtype: torch.dtype, tolerance: float
) -> None:
    expected = autograd(dtype, pairing)
    assert expected.norm() > 1
    for budget in BUDGETS:
        one = a_learner(dtype)
        batch, weigh = problem(ragged(), pairing, one)
        before, scores = copied(one), one.score(one.policy.log_prob, batch.traces)
        one.budget = budget
        logp = one.update(traces_of(ragged()), weigh)
        difference = (flat(gradient(before, one)) - expected).norm() / expected.norm()
        assert difference < tolerance, f"budget {budget}"
        torch.testing.assert_close(logp, scores, rtol=tolerance, atol=tolerance)
        assert one.grad_norm == pytest.approx(float(expected.norm()), rel=1e-4)
        assert one.steps == 1


def test_two_passes_score_without_gradient_first_and_one_pass_does_not() -> None:
    calls = {}
    for budget in (1, 10**6):
        one = a_learner()
        _, weigh = problem(ragged(), all_pairs, one)
        one.budget = budget
        seen: list[bool] = []
        one.module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        one.update(traces_of(ragged()), weigh)
        calls[budget] = seen
    count = sum(SIZES)
    assert calls[10**6] == [True]
    assert calls[1] == [False] * count + [True] * count


def test_regress_with_a_learner_gives_the_same_weights_for_every_budget() -> None:
    """Several steps: anchors of the first minibatch are taken on the way, later ones have moved residuals."""
    results = []
    for budget in (20, 64, 10**6):
        one, groups = a_learner(budget=budget, rate=0.01, max_grad_norm=1.0), ragged()
        anchor = {
            k: one.score(one.policy.log_prob, group.rollout.traces) for k, group in enumerate(groups) if k not in (0, 2)
        }
        fits = list(
            regress(
                groups,
                [[0, 2], [3, 1], [2, 3]],
                one.update,
                pairing=all_pairs,
                step=STEP,
                beta=0.0,
                anchor=anchor,
                reference={},
            )
        )
        assert torch.equal(fits[0].logp, fits[0].batch.anchor_logp)
        assert (fits[2].logp - fits[2].batch.anchor_logp).abs().max() > 1e-3
        results.append(flat(copied(one)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)


def test_a_launcher_that_speaks_of_gradient_accumulation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = build_accelerator(RebelConfig(use_cpu=True))
    weight = torch.nn.Parameter(torch.ones(()))
    accelerator.backward(3.0 * weight)
    assert weight.grad.item() == 3.0


# -- the plan -------------------------------------------------------------------------------------------------------


def padded_cost(costs: Sequence[int]) -> int:
    """Traces that are as long as they cost, padded to the longest of them."""
    return len(costs) * max(costs)


def prefix_cost(traces: Sequence[tuple[str, int]]) -> int:
    """Traces (prompt, length) whose prompts are as long as their text, each computed once."""
    prompts = {prompt for prompt, _ in traces}
    return sum(map(len, prompts)) + sum(length for _, length in traces)


def test_every_trace_is_in_one_micro_batch_and_no_budget_is_passed() -> None:
    source = random.Random(1)
    for _ in range(300):
        groups = [[source.randint(1, 40) for _ in range(source.randint(2, 9))] for _ in range(source.randint(1, 8))]
        costs = [cost for group in groups for cost in group]
        budget = source.choice([1, 30, 60, 100, 250, 1000])
        pieces = plan(groups, padded_cost, budget)
        assert sorted(place for piece in pieces for place in piece.traces) == list(range(len(costs)))
        for piece in pieces:
            padded = len(piece.traces) * max(costs[place] for place in piece.traces)
            assert padded <= budget or len(piece.traces) == 1
            if piece.groups is not None:
                assert len(piece.traces) == sum(len(groups[k]) for k in piece.groups)


def test_a_plan_fills_its_micro_batches_evenly() -> None:
    assert len(plan([[10] * 8] * 16, padded_cost, budget=320)) == 4
    assert len(plan([[10] * 8] * 16, padded_cost, budget=10**6)) == 1
    assert [len(piece.traces) for piece in plan([[10] * 8] * 9, padded_cost, budget=640)] == [40, 32]
    assert [len(piece.traces) for piece in plan([[10] * 8], padded_cost, budget=30)] == [3, 3, 2]
    costs = [[len(trace) for trace in group] for group in traces_of(ragged())]
    assert {piece.groups is None for piece in plan(costs, padded_cost, 31)} == {True, False}, "both are tested above"
    assert fill([[5], [1], [9], [5]], padded_cost, budget=10) == [[2], [0, 3], [1]]


def test_traces_that_cost_less_together_stay_together_as_far_as_they_fit() -> None:
    traces = [("aaaaaaaa", 2), ("aaaaaaaa", 3), ("aaaaaaaa", 2), ("bbbb", 1), ("cccc", 1), ("cccc", 9)]
    assert [len(run) for run in bundles(traces, prefix_cost)] == [3, 1, 2]
    assert [len(run) for run in bundles([5, 5, 5], padded_cost)] == [1, 1, 1]
    assert parts(traces[:3], prefix_cost, budget=13) == [slice(0, 1), slice(1, 3)]
    for budget in (1, 12, 13, 15, 30, 100):
        pieces = pieces_of(traces, prefix_cost, budget)
        assert sorted(place for piece in pieces for place in piece.traces) == list(range(6))
        assert all(len(p.traces) == 1 or prefix_cost([traces[i] for i in p.traces]) <= budget for p in pieces)
    assert (0, 1, 2) in [piece.traces for piece in pieces_of(traces, prefix_cost, 15)]


def test_processes_do_the_same_number_of_micro_batches_and_all_of_them() -> None:
    pieces = plan([[10, 12], [9, 9], [30, 2], [7, 7], [8, 1]], padded_cost, budget=1)
    for world in (1, 2, 3, 4, 16):
        shares = [share(pieces, rank, world) for rank in range(world)]
        assert len({len(own) for own in shares}) == 1
        done = [piece for own in shares for piece in own if piece]
        assert sorted(done, key=str) == sorted(pieces, key=str)


def test_scores_are_in_the_order_of_the_traces_for_every_budget() -> None:
    traces = tiny.traces()
    one = a_learner()
    expected = torch.cat([one.policy.log_prob([trace])[0] for trace in traces]).detach()
    for budget in (1, 25, 10**6):
        one.budget = budget
        torch.testing.assert_close(one.score(one.policy.log_prob, traces), expected)
    assert one.score(one.policy.log_prob, []).shape == (0,)


# -- the step -------------------------------------------------------------------------------------------------------


def test_clipping_shortens_the_gradient_and_reports_its_length_before() -> None:
    expected = autograd(torch.float64, all_pairs)
    one = a_learner(max_grad_norm=0.5, budget=64)
    _, weigh = problem(ragged(), all_pairs, one)
    before = copied(one)
    one.update(traces_of(ragged()), weigh)
    moved = flat(gradient(before, one))
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(moved / moved.norm(), expected / expected.norm())
    assert one.grad_norm == pytest.approx(float(expected.norm()))


def test_gradients_do_not_pile_up_over_steps() -> None:
    one = a_learner(rate=0.0)
    _, weigh = problem(ragged(), all_pairs, one)
    norms = []
    for _ in range(2):
        one.update(traces_of(ragged()), weigh)
        norms.append(one.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_moves() -> None:
    one = a_learner()
    before = copied(one)
    with pytest.raises(RunStopped, match="gradient of optimiser step 1 is nan"):
        one.update(traces_of(ragged()), lambda places, logp: logp * math.nan)
    assert one.steps == 0
    torch.testing.assert_close(copied(one), before, rtol=0, atol=0)


def test_the_average_remembers_the_stated_share_of_the_steps() -> None:
    """average = 0.5: the gain of step n is min(1, 2 / n), so the first two steps replace the average."""
    one = a_learner(rate=0.01, average=0.5)
    _, weigh = problem(ragged(), all_pairs, one)
    by_hand: list[Tensor] = []
    for gain in (1.0, 1.0, 2 / 3, 1 / 2, 2 / 5):
        one.update(traces_of(ragged()), weigh)
        now = copied(one)
        by_hand = [m + gain * (w - m) for m, w in zip(by_hand or now, now, strict=True)]
    torch.testing.assert_close(one.averaged, by_hand)
    assert (flat(one.averaged) - flat(now)).norm() > 1e-4
    with one.use_average():
        torch.testing.assert_close(copied(one), by_hand)
    torch.testing.assert_close(copied(one), now, rtol=0, atol=0)
    torch.testing.assert_close(one.averaged, by_hand)


def test_a_scaled_way_is_as_if_every_weight_had_gone_that_far() -> None:
    """The average follows: it is what the scaled weights would have given, step by step."""
    one = a_learner(rate=0.01, average=0.5)
    _, weigh = problem(ragged(), all_pairs, one)
    for _ in range(3):
        one.update(traces_of(ragged()), weigh)
    start, averaged = copied(one), [mean.clone() for mean in one.averaged]
    departure = one.depart()
    for step in (4, 5):
        one.update(traces_of(ragged()), weigh)
        scaled = [s + 1.7 * (w - s) for s, w in zip(start, copied(one), strict=True)]
        averaged = [m + 2 / step * (w - m) for m, w in zip(averaged, scaled, strict=True)]
    one.scale_way(departure, 1.7)
    torch.testing.assert_close(copied(one), scaled)
    torch.testing.assert_close(one.averaged, averaged)


@pytest.mark.parametrize(("goal", "leeway"), [(0.01, 4.0), (0.3, 40.0), (5.0, 1.5)])
def test_the_way_is_scaled_until_the_policy_has_moved_by_the_goal(goal: float, leeway: float) -> None:
    one, groups = a_learner(rate=3e-4), ragged()
    _, weigh = problem(groups, all_pairs, one)
    start = one.depart()
    assert meet(one, start, goal, leeway, groups) == Moved(1.0, 0.0)  # nothing has moved yet
    for _ in range(2):
        one.update(traces_of(groups), weigh)
    moved, before = copied(one), start.weights
    found = meet(one, start, goal, leeway, groups)
    assert found.kl == pytest.approx(divergence(one, start, probe(groups)))
    assert found.kl == pytest.approx(goal, rel=0.05) if found.scale < leeway else found.kl < goal
    scaled = [b + found.scale * (w - b) for b, w in zip(before, moved, strict=True)]
    torch.testing.assert_close(copied(one), scaled)


def test_the_probe_has_the_first_trace_of_every_group_before_the_second_of_any() -> None:
    groups = ragged()
    traces = probe(groups)
    assert len(traces) == sum(SIZES)
    assert traces[: len(groups)] == [group.rollout.traces[0] for group in groups]


def test_without_averaging_the_average_is_the_last_iterate() -> None:
    one = a_learner(rate=0.01)
    _, weigh = problem(ragged(), all_pairs, one)
    one.update(traces_of(ragged()), weigh)
    now = copied(one)
    with one.use_average():
        torch.testing.assert_close(copied(one), now, rtol=0, atol=0)
