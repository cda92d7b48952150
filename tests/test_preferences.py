"""What is read of preference sets, scored groups and comparisons, and what is said of rows that are wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from conftest import DATA

from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.margins import CLIP
from rebel.offline.preferences import ALONE, NO_VOTES, SAME, TURNS, Reading, Recorded, format_of, read, reading_of

PAIRS = Reading("preferences")
Q = {"role": "user", "content": "why?"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def group(row: dict[str, Any], how: Reading = PAIRS) -> Recorded:
    found = read(row, how, "row 3")
    assert isinstance(found, Recorded), found
    return found


def margin(row: dict[str, Any], **how: Any) -> float:
    found = group({"prompt": "p", "chosen": "c", "rejected": "r", **row}, Reading("preferences", **how))
    assert found.margins is not None
    assert torch.equal(found.margins, -found.margins.T)
    return float(found.margins[0, 1])


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", (" blue.", " green.")),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", (" blue.", " green.")),
        ({"prompt": [Q], "chosen": [says("a")], "rejected": [says("b")]}, [Q], ([says("a")], [says("b")])),
        ({"chosen": [Q, says("a")], "rejected": [Q, says("b")]}, [Q], ([says("a")], [says("b")])),
        ({"prompt": "why?", "chosen": [Q, says("a")], "rejected": [Q, says("b")]}, [Q], ([says("a")], [says("b")])),
        ({"prompt": [Q], "chosen": [Q, says("a")], "rejected": [Q, says("b")]}, [Q], ([says("a")], [says("b")])),
    ],
    ids=["text", "implicit text", "messages", "implicit messages", "prompt said twice", "messages said twice"],
)
def test_every_form_of_a_pair_that_trl_takes(row: dict, prompt: Any, completions: tuple) -> None:
    found = group({**row, "topic": 7})
    assert (found.prompt.content, found.completions) == (prompt, completions)
    assert found.prompt.meta == {"topic": 7}


def test_margins_of_pairs() -> None:
    assert margin({}) == 1.0
    assert margin({}, constant=0.3) == 0.3
    assert margin({"m": 2.5}, margin_column="m") == 2.5
    assert margin({"p": 0.75}, margin_column="p", margin_type="probability") == pytest.approx(math.log(3))
    assert margin({"p": 1.0}, margin_column="p", margin_type="probability") == CLIP
    assert margin({"p": 0.99}, margin_column="p", margin_type="probability", clip=2.0) == 2.0
    assert margin({"v": [3, 1]}, margin_column="v", margin_type="votes") == pytest.approx(math.log(3))
    assert margin({"v": [2, 2]}, margin_column="v", margin_type="votes") == 0.0
    assert RebelConfig().margin_clip == CLIP


@pytest.mark.parametrize(
    ("row", "how", "words"),
    [
        ({"chosen": None}, {}, "chosen is missing"),
        ({"rejected": " "}, {}, "rejected is empty"),
        ({"rejected": []}, {}, "rejected is"),
        ({"chosen": 5}, {}, "give text, or a list of messages"),
        ({"chosen": [says("a")]}, {}, "one of chosen and rejected is text and the other one messages"),
        ({"prompt": ""}, {}, "prompt is empty"),
        ({"prompt": [Q]}, {}, "the prompt is messages"),
        ({"m": math.nan}, {"margin_column": "m"}, "m is nan; give a finite number"),
        ({"m": None}, {"margin_column": "m"}, "m is None; give a finite number"),
        ({"m": math.inf}, {"margin_column": "m"}, "m is inf; give a finite number"),
        ({"m": -1.0}, {"margin_column": "m"}, "by which rejected is better than chosen"),
        ({"m": 0.3}, {"margin_column": "m", "margin_type": "probability"}, "by which rejected is better than chosen"),
        ({"m": 1.3}, {"margin_column": "m", "margin_type": "probability"}, "1.3 is not between 0 and 1"),
        ({"m": [0, 3]}, {"margin_column": "m", "margin_type": "votes"}, "by which rejected is better than chosen"),
        ({"m": 3}, {"margin_column": "m", "margin_type": "votes"}, "votes are [for chosen, for rejected]"),
        ({"m": [-1, 3]}, {"margin_column": "m", "margin_type": "votes"}, "votes are counts"),
    ],
)
def test_what_a_pair_says_wrongly_names_its_row(row: dict, how: dict, words: str) -> None:
    with pytest.raises(RebelError) as error:
        read({"prompt": "p", "chosen": "c", "rejected": "r", **row}, Reading("preferences", **how), "data, row 3")
    assert "data, row 3" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "One.", "rejected": "Two."},
        {"chosen": [Q, says("a")], "rejected": [{**Q, "content": "who?"}, says("b")]},
        {"prompt": [Q], "chosen": [Q, says("a")], "rejected": [says("b")]},
        {"prompt": [Q], "chosen": [says("a")], "rejected": [{**Q, "content": "who?"}, says("b")]},
    ],
)
def test_sides_with_different_prompts_are_refused(row: dict) -> None:
    with pytest.raises(RebelError, match="prompts differ"):
        read(row, PAIRS, "row 3")


def test_rows_that_cannot_be_used_are_passed_over() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "c"}
    assert read(row, PAIRS, "") == SAME
    votes = Reading("preferences", margin_column="v", margin_type="votes")
    assert read(row | {"rejected": "r", "v": [0, 0]}, votes, "") == NO_VOTES
    assert read(row | {"rejected": "r", "v": None}, votes, "") == NO_VOTES
    assert read({"prompt": "p", "completions": ["a"], "rewards": [1]}, Reading("groups"), "") == ALONE
    talk = [says("a"), Q, says("b")]
    assert read({"prompt": [Q], "chosen": talk, "rejected": [says("b")]}, PAIRS, "") == TURNS


@pytest.mark.parametrize(
    "completions", [["a", "b"], [{"text": "a"}, {"content": "b"}], [[says("a")], [says("b")]]], ids=str
)
def test_scored_groups(completions: list) -> None:
    how = Reading("groups", margin_column="rewards")
    found = group({"prompt": "p", "completions": completions, "rewards": [1, None], "id": 4}, how)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in found.completions]
    assert texts == ["a", "b"]
    assert found.rewards is not None and found.rewards[0] == 1 and found.rewards[1].isnan()
    assert found.prompt.meta == {"rewards": [1, None], "id": 4}


def test_rewards_may_stand_in_the_completions() -> None:
    row = {"prompt": "p", "completions": [{"text": "a", "reward": 0.5}, {"text": "b", "reward": 0.0}]}
    rewards = group(row, Reading("groups")).rewards
    assert rewards is not None and rewards.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completions": ["a", ""], "rewards": [1, 2]}, "completion 1 is empty"),
        ({"completions": ["a", None], "rewards": [1, 2]}, "completion 1 is missing"),
        ({"completions": "ab", "rewards": [1, 2]}, "give a list of texts"),
        ({"completions": ["a", "b"], "rewards": [1]}, "2 completions need as many rewards"),
        ({"completions": ["a", "b"], "rewards": None}, "or score them by --reward_funcs"),
        ({"completions": ["a", "b"], "rewards": [1, "x"]}, "a reward that is no number"),
    ],
)
def test_what_a_group_says_wrongly(row: dict, words: str) -> None:
    with pytest.raises(RebelError, match="row 3") as error:
        read({"prompt": "p", **row}, Reading("groups", margin_column="rewards"), "row 3")
    assert words in str(error.value)


def comparisons(given: Any, kind: Any = "margin") -> list[list[float]]:
    how = Reading("comparisons", margin_column="m", margin_type=kind)
    found = group({"prompt": "p", "completions": ["a", "b", "c"], "m": given}, how).margins
    assert found is not None
    return found.tolist()


def test_comparisons_keep_their_circles() -> None:
    circle = [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    assert comparisons(circle) == circle
    assert comparisons(circle, "votes") == [[CLIP * x for x in line] for line in circle]
    votes = [{"first": 0, "second": 1, "share": 1.0}, {"first": 1, "second": 2, "share": 1.0}]
    votes.append({"first": 2, "second": 0, "share": 1.0})
    assert comparisons(votes) == comparisons(circle, "votes")


def test_ties_and_pairs_that_nobody_compared() -> None:
    found = comparisons([[0, 0, None], [0, 0, 1], [None, -1, 0]], "votes")
    assert found[0][1] == 0 and math.isnan(found[0][2]) and found[1][2] == CLIP
    how = Reading("comparisons", margin_column="m")
    none = {"prompt": "p", "completions": ["a", "b"], "m": [{"first": 0, "second": 1, "share": None}]}
    assert read(none, how, "") == NO_VOTES


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], "margin", "contradict each other"),
        ([1, 2, 3], "margin", "--data_format groups"),
        ([[0, 2, 0], [-2, 0, 0], [0, 0, 0]], "votes", "1 (better), 0 (tie) and -1 (worse)"),
        ([{"first": 0, "second": 9, "share": 1}], "votes", "completion 9"),
        ([[0, 0.9, 0.5], [0.9, 0, 0.5], [0.5, 0.5, 0]], "probability", "contradict each other"),
    ],
)
def test_comparisons_that_make_no_sense(given: Any, kind: str, words: str) -> None:
    with pytest.raises((RebelError, TypeError)) as error:
        comparisons(given, kind)
    assert words in str(error.value) and "row 3" in str(error.value)


def test_the_format_follows_from_the_columns() -> None:
    assert format_of(["prompt", "chosen", "rejected"], "auto", None, False, "d") == "preferences"
    assert format_of(["prompt", "completions", "rewards"], "auto", None, False, "d") == "groups"
    assert format_of(["prompt", "completions", "comparisons"], "auto", None, False, "d") == "comparisons"
    assert format_of(["prompt", "completions", "pref"], "auto", "pref", False, "d") == "comparisons"
    assert format_of(["prompt", "completions", "s"], "groups", "s", False, "d") == "groups"
    both = ["chosen", "rejected", "completions", "rewards"]
    with pytest.raises(RebelError, match="as preferences and as groups; choose by --data_format"):
        format_of(both, "auto", None, False, "d")
    assert format_of(both, "preferences", None, False, "d") == "preferences"
    with pytest.raises(RebelError, match="no completions to learn from: it has the columns prompt, answer"):
        format_of(["prompt", "answer"], "auto", None, False, "d")
    with pytest.raises(RebelError, match="--data_format preferences does not fit d"):
        format_of(["prompt", "answer"], "preferences", None, False, "d")


def test_a_margin_column_is_taken_where_there_is_one() -> None:
    assert reading_of(["chosen", "margin"], format="preferences").margin_column == "margin"
    assert reading_of(["chosen"], format="preferences").margin_column is None
    with pytest.raises(RebelError, match="--margin_column m: the data have only the columns chosen"):
        reading_of(["chosen"], format="preferences", margin_column="m")


def test_real_comparisons_are_read_whole() -> None:
    source = DATA / "qa-feedback" / "tournaments.jsonl"
    if not source.exists():
        pytest.skip(f"the comparisons are not at {source}; set REBEL_DATA to the folder that has them")
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    how = Reading("comparisons", margin_column="pref", margin_type="votes")
    margins = [group(row, how).margins for row in rows]
    decided = sum(int((m > 0).sum()) for m in margins if m is not None)
    assert (len(margins), decided) == (500, 2616)
