"""Win rates: hand-computed cases, the interval's coverage on simulated data, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rebel.errors import RebelError
from rebel.winrates import Verdict, checked, controlled, interval, lengths, win_rate


def test_a_hand_computed_case() -> None:
    verdicts = [
        Verdict(0, 1.0, 0.0),  # ours, whichever comes first: 1
        Verdict(0, 1.0, 1.0),  # the first place wins both times: 0.5, a tie
        Verdict(1, 0.0, 1.0),  # theirs: 0
        Verdict(2, 0.7, 0.5),  # 0.6: a win, and not consistent (a win and a tie)
        Verdict(3, 0.5, 0.5),  # a tie, consistent
        Verdict(4, None, 0.3),  # one order has no answer
    ]
    found = win_rate(verdicts)
    assert found.win_rate == pytest.approx((0.75 + 0 + 0.6 + 0.5) / 4)
    assert (found.wins, found.ties, found.losses) == (2 / 5, 2 / 5, 1 / 5)
    assert found.swap_consistency == 3 / 5
    assert found.first_place == pytest.approx((1 + 0 + 1 + 1 + 0 + 1 + 0.7 + 0.5 + 0.5 + 0.5) / 10)
    assert (found.prompts, found.pairs, found.unanswered) == (4, 5, 1)
    assert found.low < found.win_rate < found.high


def test_a_judge_of_places_alone_finds_half() -> None:
    found = win_rate([Verdict(k, 0.9, 0.9) for k in range(20)])
    assert found.win_rate == pytest.approx(0.5)
    assert found.swap_consistency == 0 and found.first_place == pytest.approx(0.9)


def test_changing_sides_mirrors_the_win_rate() -> None:
    random = np.random.default_rng(3)
    verdicts = [Verdict(k // 2, *random.random(2)) for k in range(60)]
    ours = win_rate(verdicts)
    theirs = win_rate([replace(v, forward=v.backward, backward=v.forward) for v in verdicts])
    assert theirs.win_rate == pytest.approx(1 - ours.win_rate)
    assert (theirs.wins, theirs.losses) == (ours.losses, ours.wins)
    assert theirs.low == pytest.approx(1 - ours.high, abs=0.01)


def test_prompts_and_not_pairs_are_the_sample() -> None:
    """A prompt with many pairs counts once, and repeating its pairs makes the interval no narrower."""
    few = [Verdict(k, float(k % 2), 1 - float(k % 2)) for k in range(10)]
    assert win_rate(few + [few[1]] * 30).win_rate == win_rate(few).win_rate == 0.5
    many = win_rate(few * 20)
    assert (many.low, many.high) == (win_rate(few).low, win_rate(few).high)


def test_the_same_seed_gives_the_same_interval() -> None:
    means = np.random.default_rng(0).random(30)
    assert interval(means, 1) == interval(means, 1) != interval(means, 2)


@pytest.mark.parametrize(("p", "prompts"), [(0.5, 40), (0.7, 40), (0.6, 100)])
def test_the_interval_covers_the_truth_as_often_as_it_says(p: float, prompts: int) -> None:
    """Scores are 0, a half or 1. 200 intervals of 95%: fewer than 88% would be six standard errors below."""
    random = np.random.default_rng(7)
    tie = 0.2
    hits = 0
    for trial in range(200):
        means = random.choice([1.0, 0.5, 0.0], prompts, p=[p - tie / 2, tie, 1 - p - tie / 2])
        low, high = interval(means, trial)
        hits += low <= p <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_where_all_prompts_came_out_alike() -> None:
    low, high = interval(np.ones(20))
    assert high == 1 and low == pytest.approx(0.025 ** (1 / 20))  # Clopper and Pearson
    assert interval(np.zeros(20)) == pytest.approx((0, 1 - low))
    assert interval(np.full(20, 0.5)) == (0.5, 0.5)
    assert interval(np.ones(1)) == (0.0, 1.0)


def test_length_alone_is_no_win_at_equal_length() -> None:
    """A judge of length alone, and ours mostly longer: nearly all is won, and half of it at equal length."""
    random = np.random.default_rng(0)
    difference = random.normal(15, 20, 400).round().astype(int)
    scores = (difference > 0).astype(float)
    assert scores.mean() > 0.7
    assert controlled(scores, difference.astype(float)) == pytest.approx(0.5, abs=0.08)


def test_a_win_that_is_not_length_stays() -> None:
    random = np.random.default_rng(1)
    difference = random.normal(0, 20, 2000)
    scores = (random.random(2000) < 0.75).astype(float)
    assert controlled(scores, difference) == pytest.approx(0.75, abs=0.03)


def test_lengths_of_both_sides() -> None:
    found = lengths([1.0, 0.0, 0.5, 1.0], ours=[10, 10, 30, 5], theirs=[5, 20, 30, 10])
    assert (found.ours, found.theirs) == (13.75, 16.25)
    assert found.longer_preferred == pytest.approx((1 + 1 + 0) / 3)
    assert not found.differ and lengths([1.0, 0.0], [20, 20], [10, 10]).differ
    assert math.isnan(lengths([1.0, 0.0], [20, 20], [10, 10]).controlled)


def test_what_is_refused() -> None:
    with pytest.raises(RebelError, match="none of the 2 pairs"):
        win_rate([Verdict(0, None, 1.0), Verdict(1, 0.5, None)])
    with pytest.raises(RebelError, match=r"returned 1\.5"):
        checked([0.5, 1.5], 2, "j")
    with pytest.raises(RebelError, match="returned nan"):
        checked([math.nan], 1, "j")
    with pytest.raises(RebelError, match="1 values for 2"):
        checked([0.5], 2, "j")
