"""Comparisons of pairs become margins: antisymmetric, circles kept, and what contradicts itself is refused."""

from __future__ import annotations

import math

import pytest
import torch

from rebel.errors import RebelError
from rebel.margins import (
    CLIP,
    Margin,
    Vote,
    checked_margins,
    margins_of_numbers,
    margins_of_probabilities,
    margins_of_votes,
)
from rebel.pairing import all_pairs

NAN = math.nan


def test_votes_become_clipped_logits_of_their_mean_share() -> None:
    votes = [Vote(0, 1, 1.0), Vote(1, 0, 0.25), Vote(2, 1, 1.0), Vote(0, 2, 0.5)]
    margins = margins_of_votes(4, votes)
    assert margins[0, 1] == pytest.approx(math.log(0.875 / 0.125))
    assert margins[2, 1] == CLIP and margins[1, 2] == -CLIP
    assert margins[0, 2] == 0 and margins[2, 0] == 0
    assert margins[3, :3].isnan().all() and margins[:3, 3].isnan().all() and margins[3, 3] == 0
    assert all_pairs(margins).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_a_circle_stays_a_circle() -> None:
    margins = margins_of_votes(3, [Vote(0, 1, 1.0), Vote(1, 2, 1.0), Vote(2, 0, 1.0)], clip=2.0)
    expected = torch.tensor([[0.0, 2, -2], [-2, 0, 2], [2, -2, 0]], dtype=torch.float64)
    assert torch.equal(margins, expected)


def test_of_a_reward_in_the_model_of_bradley_and_terry_the_margins_are_its_differences() -> None:
    rewards = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    difference = rewards[:, None] - rewards[None, :]
    torch.testing.assert_close(margins_of_probabilities(difference.sigmoid()), difference)
    one_way = difference.sigmoid().masked_fill(torch.ones(3, 3).tril(-1).bool(), NAN)
    torch.testing.assert_close(margins_of_probabilities(one_way), difference)


def test_numbers_are_averaged_and_may_be_said_in_both_orders() -> None:
    margins = margins_of_numbers(3, [Margin(0, 1, 1.0), Margin(0, 1, 2.0), Margin(1, 0, -1.5), Margin(2, 0, 4.0)])
    assert margins[0, 1] == 1.5 and margins[1, 0] == -1.5 and margins[0, 2] == -4 and margins[1, 2].isnan()
    assert torch.equal(checked_margins(margins).nan_to_num(nan=9.0), margins.nan_to_num(nan=9.0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: margins_of_votes(2, [Vote(0, 1, None)]), "no winner"),
        (lambda: margins_of_votes(2, [Vote(0, 1, NAN)]), "no winner"),
        (lambda: margins_of_votes(2, [Vote(0, 1, 2.0)]), "0.5 for a tie"),
        (lambda: margins_of_votes(2, [Vote(0, 2, 1.0)]), "the prompt has 2"),
        (lambda: margins_of_votes(2, [Vote(1, 1, 1.0)]), "with itself"),
        (lambda: margins_of_votes(2, [Vote(0, 1, 1.0)], clip=0.0), "clipped at 0"),
        (lambda: margins_of_votes(2, []), "no two of the completions"),
        (lambda: margins_of_numbers(2, [Margin(0, 1, NAN)]), "the margin of 0 over 1 is nan"),
        (lambda: margins_of_numbers(2, [Margin(0, 1, 1.0), Margin(1, 0, 1.0)]), "contradict each other"),
        (lambda: margins_of_probabilities(torch.tensor([[0.5, 0.9], [0.9, 0.5]])), "contradict each other"),
        (lambda: margins_of_probabilities(torch.tensor([[0.5, 1.2], [NAN, 0.5]])), "not between 0 and 1"),
        (lambda: checked_margins(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), "contradict each other"),
        (lambda: checked_margins(torch.tensor([[0.0, 1.0], [NAN, 0.0]])), "NaN in one order"),
        (lambda: checked_margins(torch.tensor([[0.0, math.inf], [-math.inf, 0.0]])), "infinite"),
    ],
)
def test_what_is_refused(make, said: str) -> None:
    with pytest.raises(RebelError, match=said):
        make()
