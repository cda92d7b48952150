"""Credit by stretches: what a stretch of a completion brought, by the rewards of what was written until then."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rebel.algorithm import rebel_loss, regression_batch, to_come, trace_weights
from rebel.build.credit import decided, stretches_of
from rebel.checkpoint import Progress
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.gains import credited, known_halfway
from rebel.pairing import all_pairs, best_against_worst
from rebel.policies.layouts import Apart, Layout, NoPadding, PromptOnce
from rebel.policies.rows import Stretches
from rebel.rewards.beginnings import WithBeginnings
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes, PerCompletion
from rebel.rewards.groups import kept, scaled
from rebel.types import Completion, Prompt, Rollout, Scored, TokenTrace
from rebel.validate import validate

ETA = 3.0
F64 = torch.float64
WORDS = list(product((0, 1), repeat=3))
"""All completions of three tokens of two kinds: under the uniform policy, whose means are those over this group."""
G, C = len(WORDS), 3


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def everything(rewards: Tensor, gains: Tensor | None = None) -> Scored:
    rollout = Rollout(Prompt("x"), tuple(Completion(str(word), word) for word in WORDS))
    return Scored(rollout, rewards=rewards, gains=gains)


def of_prefixes(value: Any) -> Tensor:
    """A function of prefixes at the beginnings of every word: column k is that of the first k tokens."""
    return torch.tensor([[value(word[:k]) for k in range(C + 1)] for word in WORDS], dtype=F64)


def log_probs(logits: dict[tuple[int, ...], Tensor]) -> Tensor:
    """log p of every token given those before it."""
    rows = [[logits[word[:k]].log_softmax(0)[word[k]] for k in range(C)] for word in WORDS]
    return torch.stack([torch.stack(row) for row in rows])


def uniform() -> dict[tuple[int, ...], Tensor]:
    prefixes = [word[:k] for word in WORDS for k in range(C)]
    return {prefix: torch.zeros(2, dtype=F64, requires_grad=True) for prefix in prefixes}


def gradient(scored: Scored, lam: float, whole: bool) -> Tensor:
    """Of the loss at the anchor, in the logits of all prefixes."""
    logits = uniform()
    logp = log_probs(logits)
    logp = logp.sum(dim=1) if whole else logp
    problem = regression_batch(scored, all_pairs, logp.detach(), lam=lam)
    (trace_weights(logp.detach(), problem, ETA) * logp).sum().backward()
    return torch.stack([weight.grad for weight in logits.values() if weight.grad is not None])


@pytest.mark.parametrize("seed", [1, 2])
def test_at_lambda_one_the_expected_gradient_is_that_of_whole_completions_whatever_the_values(seed: int) -> None:
    rewards = randn(G, seed=seed)
    wild = {word[:k]: float(randn(1, seed=10 * seed + 3 * k + sum(word[:k]))) for word in WORDS for k in range(C)}
    values = of_prefixes(lambda prefix: wild.get(prefix, 0.0))
    values[:, C] = rewards
    by_stretch = gradient(everything(rewards, values.diff(dim=1)), 1.0, whole=False)
    torch.testing.assert_close(by_stretch, gradient(everything(rewards), 1.0, whole=True))


def test_with_true_values_no_lambda_changes_the_expected_gradient() -> None:
    rewards = randn(G, seed=3)
    true = of_prefixes(
        lambda prefix: float(
            torch.stack([r for r, w in zip(rewards, WORDS, strict=True) if w[: len(prefix)] == prefix]).mean()
        )
    )
    whole = gradient(everything(rewards), 1.0, whole=True)
    for lam in (0.0, 0.3, 1.0):
        torch.testing.assert_close(gradient(everything(rewards, true.diff(dim=1)), lam, whole=False), whole)


def test_with_soft_values_the_minimiser_is_that_of_mirror_descent() -> None:
    """pi ~ pi_t exp(eta r) has no loss at all, and the log-ratio of a stretch is eta times its gain."""
    rewards = randn(G, seed=4)

    def soft(prefix: tuple[int, ...]) -> float:
        own = torch.stack([r for r, word in zip(rewards, WORDS, strict=True) if word[: len(prefix)] == prefix])
        return float((ETA * own).exp().mean().log() / ETA)

    values = of_prefixes(soft)
    best = (ETA * rewards).log_softmax(0)
    tokens = of_prefixes(
        lambda p: float(
            torch.logsumexp(torch.stack([b for b, w in zip(best, WORDS, strict=True) if w[: len(p)] == p]), 0)
        )
    )
    problem = regression_batch(
        everything(rewards, values.diff(dim=1)), all_pairs, log_probs(uniform()).detach(), lam=0.0
    )
    assert float(rebel_loss(tokens.diff(dim=1), problem, ETA)) == pytest.approx(0, abs=1e-20)
    assert float(rebel_loss(problem.anchor_logp, problem, ETA)) > 0.1


@pytest.mark.parametrize("pairing", [all_pairs, best_against_worst])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_the_weights_are_the_gradient_of_the_loss(lam: float, beta: float, pairing: Any) -> None:
    scored = everything(randn(G, seed=5), randn(G, C, seed=6))
    anchor, reference = randn(G, C, seed=7), randn(G, C, seed=8)
    problem = regression_batch(scored, pairing, anchor, reference, beta, lam=lam)
    logp = (anchor + 0.4 * randn(G, C, seed=9)).requires_grad_()
    (ETA * rebel_loss(logp, problem, ETA)).backward()
    torch.testing.assert_close(trace_weights(logp.detach(), problem, ETA), logp.grad)
    written = torch.zeros((), dtype=F64)
    credit = to_come(scored.gains - beta * (anchor - reference), lam)  # pyright: ignore[reportOptionalOperand]
    for i, j in problem.pairs.tolist():
        e = (logp.detach() - anchor) / ETA - credit
        written += (e[i] - e[j]).square().sum() / len(problem.pairs)
    torch.testing.assert_close(rebel_loss(logp.detach(), problem, ETA), written)


def test_one_stretch_is_the_whole_completion() -> None:
    rewards, anchor, reference = randn(G, seed=1), randn(G, 1, seed=2), randn(G, 1, seed=3)
    logp = anchor + randn(G, 1, seed=4)
    one = regression_batch(everything(rewards, rewards[:, None]), all_pairs, anchor, reference, 0.3, lam=0.5)
    whole = regression_batch(everything(rewards), all_pairs, anchor[:, 0], reference[:, 0], 0.3)
    torch.testing.assert_close(trace_weights(logp, one, ETA)[:, 0], trace_weights(logp[:, 0], whole, ETA))


def test_what_is_to_come() -> None:
    gains = torch.tensor([[1.0, 2.0, 4.0]])
    assert to_come(gains, 0.0).tolist() == gains.tolist()
    assert to_come(gains, 0.5).tolist() == [[3.0, 4.0, 4.0]]
    assert to_come(gains, 1.0).tolist() == [[7.0, 6.0, 4.0]]
    assert gains.tolist() == [[1.0, 2.0, 4.0]], "the gains stay what they are"


# -- gains ----------------------------------------------------------------------------------------------------------


def scored(rewards: list[float], beginnings: list[list[float]]) -> Scored:
    rollout = Rollout(Prompt("x"), tuple(Completion("y", k) for k in range(len(rewards))))
    return Scored(rollout, rewards=torch.tensor(rewards, dtype=F64), beginnings=torch.tensor(beginnings, dtype=F64))


def gains_of(*groups: Scored) -> list[Tensor]:
    return [group.gains for group in credited(groups) if group.gains is not None]


def gains_beside_its_like(group: Scored) -> Tensor:
    """With the share that this group alone would give."""
    return gains_of(group, group)[0]


def random_groups(count: int = 3, size: int = 4) -> list[Scored]:
    empty = scored([0.0] * size, [[0.0, 0.0]] * size)
    seeds = range(1, count + 1)
    return [replace(empty, rewards=randn(size, seed=s), beginnings=randn(size, 2, seed=90 + s)) for s in seeds]


def test_gains_sum_to_the_reward_less_the_mean_of_its_group() -> None:
    groups = random_groups()
    for group, gains in zip(groups, gains_of(*groups), strict=True):
        assert group.rewards is not None
        torch.testing.assert_close(gains.sum(dim=1), group.rewards - group.rewards.mean())


def test_beginnings_that_say_nothing_leave_all_to_the_last_stretch() -> None:
    gains = gains_beside_its_like(scored([1.0, 0.0, 5.0], [[7.0, 2.0]] * 3))
    assert gains.tolist() == [[0.0, 0.0, -1.0], [0.0, 0.0, -2.0], [0.0, 0.0, 3.0]]


def test_beginnings_that_say_all_leave_nothing_to_later_ones_in_any_unit() -> None:
    for unit in (1.0, -20.0):
        early = [[unit * 0.0, unit * 1.0], [unit * 3.0, unit * 3.0], [unit * 0.0, unit * 2.0]]
        gains = gains_beside_its_like(scored([1.0, 3.0, 2.0], early))
        torch.testing.assert_close(gains[:, 2], torch.zeros(3, dtype=F64))
        assert gains[1, 0] > 0 > gains[0, 0] == gains[2, 0]


@pytest.mark.parametrize("level", [0.0, -30.0])
def test_a_completion_that_has_ended_is_worth_its_reward_whatever_the_level_of_beginnings(level: float) -> None:
    """What has ended has no part in the share of the beginnings, nor in the mean that they are compared with."""
    nan = math.nan
    early = [[nan, nan], [1.0 + level, nan], [2.0 + level, 2.0 + level], [7.0 + level, 5.0 + level]]
    gains = gains_beside_its_like(scored([4.0, 1.0, 2.0, 1.0], early))
    assert gains[0].tolist() == [2.0, 0.0, 0.0]
    assert gains[1, 2] == 0 != gains[1, 1], "it ended in its second stretch"
    # of rewards 1, 2, 1 on beginnings 1, 2, 7 least squares find -2 / 31
    torch.testing.assert_close(gains[1:, 0], torch.tensor([7.0, 4.0, -11.0], dtype=F64) / 3 * 2 / 31)


def test_the_share_of_beginnings_is_that_of_the_other_groups_and_a_group_s_level_is_none_of_it() -> None:
    one, other = scored([0.0, 2.0], [[10.0], [11.0]]), scored([5.0, 5.0], [[-3.0], [-2.0]])
    first, second = gains_of(one, other)  # the share is 2 in the first group and 0 in the second
    assert first.tolist() == [[0.0, -1.0], [0.0, 1.0]] and second.tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    assert gains_of(one)[0].tolist() == [[0.0, -1.0], [0.0, 1.0]], "alone it knows no share"


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("unit", [0.1, 100.0])
def test_scaled_rewards_have_gains_that_do_not_depend_on_the_unit(scale: Any, unit: float) -> None:
    """Some completions have ended: their rewards stand beside beginnings."""
    groups = [
        replace(group, beginnings=torch.stack([torch.tensor([math.nan, 0.0, 1.0, 2.0]), torch.ones(4)], dim=1))
        for group in random_groups()
    ]
    other = [replace(g, rewards=unit * g.rewards, beginnings=unit * g.beginnings) for g in groups]  # pyright: ignore[reportOptionalOperand]
    for one, same in zip(gains_of(*scaled(groups, scale)), gains_of(*scaled(other, scale)), strict=True):
        torch.testing.assert_close(one, same, rtol=0.01, atol=0.01)  # but for the epsilon of the scale


def test_groups_without_beginnings_have_no_gains_and_beginnings_follow_the_completions_that_are_kept() -> None:
    plain = replace(scored([0.0, 1.0], [[0.0], [1.0]]), beginnings=None)
    assert credited([plain])[0] is plain and credited([]) == []
    with pytest.raises(AssertionError, match="of all groups are scored, or of none"):
        credited([plain, scored([0.0, 1.0], [[0.0], [1.0]])])
    left = kept(scored([0.0, 1.0, 2.0], [[3.0], [4.0], [5.0]]), torch.tensor([True, False, True]))
    assert left is not None and left.beginnings is not None and left.beginnings.tolist() == [[3.0], [5.0]]


@pytest.mark.parametrize(("early", "share"), [([[0.0], [1.0]], 1.0), ([[3.0], [3.0]], 0.0)])
def test_how_much_is_known_halfway(early: list[list[float]], share: float) -> None:
    group = scored([2.0, 6.0], early)
    assert known_halfway(credited([group, group])) == pytest.approx(share)
    flat = scored([2.0, 2.0], early)
    assert known_halfway(credited([flat, flat])) is None is known_halfway([group])


def test_half_of_a_completion_is_half_of_its_own_stretches() -> None:
    """After two stretches of four, and after one of two; of one that has a single stretch nothing is known before."""
    nan = math.nan
    long = scored([1.0, 3.0], [[0.0, 1.0, 1.0], [0.0, 3.0, 3.0]])
    short = scored([1.0, 3.0], [[1.0, nan, nan], [3.0, nan, nan]])
    single = scored([1.0, 3.0], [[nan] * 3, [nan] * 3])
    assert known_halfway(credited([long, long])) == pytest.approx(1.0)
    assert known_halfway(credited([short, short])) == pytest.approx(1.0)
    assert known_halfway(credited([single, single])) == pytest.approx(0.0)


# -- rewards of beginnings ------------------------------------------------------------------------------------------


def rollout(*lengths: int) -> Rollout[TokenTrace]:
    traces = [TokenTrace((1, 2), tuple(range(10, 10 + length))) for length in lengths]
    return Rollout(Prompt("x"), tuple(Completion(f"{len(t.completion)} long", t) for t in traces))


def write(prompt: Prompt, prompt_ids: Any, ids: Any) -> Completion[TokenTrace]:
    assert tuple(prompt_ids) == (1, 2)
    return Completion(f"{len(ids)} of {ids[0]}", TokenTrace(tuple(prompt_ids), tuple(ids)), finished=False)


def test_beginnings_are_what_stands_after_each_stretch_and_are_scored_in_one_call() -> None:
    seen: list[list[str]] = []

    def count(completions: list[str], **rest: Any) -> list[float]:
        seen.append(completions)
        return [float(text.split()[0]) for text in completions]

    reward = WithBeginnings(Weighted([PerCompletion(count)]), write, tokens=2, count=4)
    one, other = reward([rollout(2, 5), rollout(1, 9)])
    assert seen == [["2 of 10", "4 of 10", "2 of 10", "4 of 10", "6 of 10"], ["2 long", "5 long", "1 long", "9 long"]]
    assert one.rewards is not None and one.rewards.tolist() == [2.0, 5.0]
    nan = math.nan
    expected = torch.tensor([[nan, nan, nan], [2.0, 4.0, nan]]), torch.tensor([[nan, nan, nan], [2.0, 4.0, 6.0]])
    for group, table in zip((one, other), expected, strict=True):
        assert group.beginnings is not None
        torch.testing.assert_close(group.beginnings, table, equal_nan=True)


def test_beginnings_of_text_in_several_parts_end_where_the_stretches_of_the_policy_do() -> None:
    trace = TokenTrace((1, 2), (10, 11, 12, 13, 14, 15, 16), (True, False, False, True, True, False, True))
    reward = WithBeginnings(Weighted([PerCompletion(lambda completions, **_: [0.0] * len(completions))]), write, 2, 4)
    begun = reward.begun(Rollout(Prompt("x"), (Completion("7 long", trace),)))
    assert [c.content for c in begun.completions] == ["4 of 10"], "10 and 13, with the two that are read between them"
    stretch = Stretches(2, 4).of(torch.zeros(4, dtype=torch.long))
    assert stretch.tolist() == [0, 0, 1, 1]


def test_what_is_noted_of_beginnings_is_not_kept() -> None:
    notes = Notes()

    def talks(completions: list[str], log_metric: Any, log_extra: Any, **rest: Any) -> list[float]:
        log_metric("length", len(completions[0]))
        log_extra("first", completions)
        return [0.0] * len(completions)

    given = PerCompletion(talks, notes=notes)
    WithBeginnings(Weighted([given]), write, tokens=2, count=4, aside=notes.aside)([rollout(5, 9)])
    assert notes.columns == {"first": ["5 long", "9 long"]} and notes.take_metrics() == {"length": 6.0}


def test_completions_of_one_stretch_and_beginnings_without_a_value() -> None:
    def odd(completions: list[str], **rest: Any) -> list[float | None]:
        return [None if text.startswith("4 of 10") else float(text[0]) for text in completions]

    other = Completion("6 long", TokenTrace((1, 2), (20, 21, 22, 23, 24, 25)))
    reward = WithBeginnings(Weighted([PerCompletion(odd)]), write, tokens=2, count=3)
    short, long = reward([rollout(1, 2), replace(rollout(6, 6), completions=(*rollout(6).completions, other))])
    assert short.beginnings is not None and short.beginnings.isnan().all()
    assert long.beginnings is not None and long.beginnings.tolist() == [[2.0, 4.0], [2.0, 4.0]]


# -- log-probabilities of stretches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [Apart(), PromptOnce(), NoPadding(Apart()), NoPadding(PromptOnce())], ids=str)
def test_the_columns_are_the_tokens_of_each_stretch(kind: str, layout: Layout) -> None:
    policy = replace(tiny.policy(kind), layout=layout)
    traces = [
        TokenTrace((5, 6), (7, 8, 9, 10, 11)),
        TokenTrace((5, 6), (12,)),
        TokenTrace((5, 6), (13, 14, 15, 16, 17, 18, 19), (True, True, False, False, True, True, True)),
    ]
    found = replace(policy, stretches=Stretches(2, 3)).log_prob(traces)
    assert found.shape == (3, 3)
    torch.testing.assert_close(found.sum(dim=1), policy.log_prob(traces)[:, 0])
    begun = [TokenTrace((5, 6), (7, 8)), TokenTrace((5, 6), (7, 8, 9, 10))]
    torch.testing.assert_close(found[0].cumsum(dim=0)[:2], policy.log_prob(begun)[:, 0])
    single = replace(policy, stretches=Stretches(1, 7)).log_prob(traces)
    torch.testing.assert_close(found[0], torch.stack([single[0, :2].sum(), single[0, 2:4].sum(), single[0, 4]]))
    assert found[1, 1:].tolist() == [0.0, 0.0] and single[2, 5:].tolist() == [0.0, 0.0], "five tokens were written"
    torch.testing.assert_close(found[2, 2], single[2, 4])


def test_the_last_stretch_has_whatever_is_left() -> None:
    trace = torch.tensor([0, 0, 0, 0, 0, 2, 2, 1])
    assert Stretches(2, 2).of(trace).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert stretches_of(RebelConfig(credit="stretch", credit_tokens=5, max_completion_length=12)) == Stretches(5, 3)


# -- whole runs -----------------------------------------------------------------------------------------------------


def test_stretches_are_chosen_where_every_reward_says_that_it_judges_beginnings() -> None:
    def able(completions: list[str], **rest: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def other(completions: list[str], **rest: Any) -> list[float]:
        return [0.0 for _ in completions]

    able.judges_beginnings = True  # pyright: ignore[reportFunctionMemberAccess]
    config = RebelConfig()
    assert decided(config, Weighted([PerCompletion(able)])).credit == "stretch"
    assert decided(config, Weighted([PerCompletion(partial(able))])).credit == "stretch"
    assert decided(config, Weighted([PerCompletion(able), PerCompletion(other)])).credit == "trajectory"
    assert decided(config, None).credit == "trajectory"
    assert decided(replace(config, pairing="extremes"), Weighted([PerCompletion(able)])).credit == "trajectory"
    assert decided(replace(config, rounds=2), Weighted([PerCompletion(able)])).credit == "trajectory"
    assert decided(replace(config, credit="trajectory"), Weighted([PerCompletion(able)])).credit == "trajectory"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge": "a.py:f"}, "--credit stretch with --judge a.py:f: beginnings of completions are scored by reward"),
        ({"rounds": 2}, "--credit stretch with --rounds 2"),
        ({"pairing": "extremes"}, "--credit stretch with --pairing extremes: who is best"),
        ({"offline": True}, "--credit stretch with --offline"),
        ({"credit_tokens": 0}, "--credit_tokens 0"),
        ({"credit_lambda": 1.5}, "--credit_lambda 1.5: use a number from 0 to 1"),
        ({"pipeline_name_or_path": "p", "model_name_or_path": None}, "--credit stretch is for stretches of text"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    given = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["exact_match"], "iterations": 1}
    with pytest.raises(RebelError, match=re.escape(said)):
        validate(RebelConfig(**{**given, "credit": "stretch", **settings}))


def test_a_run_by_stretches_learns_and_micro_batches_have_no_say(tmp_path: Path) -> None:
    """Its reward is the share of even tokens, which each stretch shows."""
    settings = {"credit": "stretch", "credit_tokens": 2, "eta": "auto", "kl_per_iteration": None, "iterations": 12}
    wide = tiny.trained(tmp_path / "wide", **settings, learning_rate=1e-2)
    narrow = tiny.trained(tmp_path / "narrow", **settings, learning_rate=1e-2, tokens_per_micro_batch=24)
    rows = tiny.rows(tmp_path / "wide")
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert rewards[-1] > rewards[0] + 0.2
    for one, other in zip(tiny.weights(wide), tiny.weights(narrow), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


def test_a_run_takes_the_settings_and_its_collector_finds_the_gains(tmp_path: Path) -> None:
    made = tiny.job(tmp_path, credit="stretch", credit_tokens=2, credit_lambda=0.7, beta=0.1)
    assert made.run.regression.lam == 0.7 and made.config.credit == "stretch"
    drawn = made.run.collector(made.run.learner, Progress(), 1, made.run.hooks)
    for group in drawn.kept:
        assert group.gains is not None and group.rewards is not None
        torch.testing.assert_close(group.gains.sum(dim=1), group.rewards - group.rewards.mean())
        assert group.gains.shape[1] == 3 and group.gains[:, 0].any(), "the first tokens say something"
    whole = tiny.job(tmp_path, beta=0.1)
    assert all(
        group.gains is None for group in whole.run.collector(whole.run.learner, Progress(), 1, whole.run.hooks).kept
    )


@pytest.mark.parametrize("flags", [(True, False), (True,) * 4])
def test_a_mask_has_a_flag_for_each_token_of_the_completion(flags: tuple[bool, ...]) -> None:
    with pytest.raises(ValueError, match=rf"a mask of {len(flags)} flags for a completion of 3 tokens"):
        TokenTrace((1, 2), (10, 11, 12), flags)
