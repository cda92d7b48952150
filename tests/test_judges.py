"""Judges of every kind, both orders asked, and win rates whose regression is exactly the win rate against pi_t."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rebel.algorithm import rebel_loss, regression_batch
from rebel.errors import RebelError
from rebel.pairing import all_pairs
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes, PerCompletion
from rebel.rewards.judge_load import load_judge
from rebel.rewards.judge_models import LanguageModelJudge, model_judge
from rebel.rewards.judge_text import TEMPLATE, as_text, question, template_of, verdict
from rebel.rewards.judges import BradleyTerry, FunctionJudge, JudgeFailed, TableJudge, ask, table_of_file
from rebel.rewards.models import RewardModel
from rebel.rewards.winrate import AgainstFirst, WinRate
from rebel.types import Comparison, Completion, Judge, Prompt, Reward, Rollout

ROCK = {("r", "s"): 1.0, ("s", "p"): 0.9, ("p", "r"): 0.8}
X = Prompt("x", {"row": 3})


def table(values: dict[Any, float] = ROCK) -> TableJudge:
    return TableJudge(values, lambda prompt, completion: completion)


def rollout(*contents: Any, others: int = 0) -> Rollout:
    """Completions of which the last `others` are not the policy's."""
    sources = ["policy"] * (len(contents) - others) + ["data"] * others
    return Rollout(X, tuple(Completion(y, k, s) for k, (y, s) in enumerate(zip(contents, sources, strict=True))))


def rates(reward: Reward, *contents: Any, others: int = 0) -> list[float]:
    (scored,) = reward([rollout(*contents, others=others)])
    assert scored.rewards is not None
    return scored.rewards.tolist()


def longer(prompts: list[str], first: list[str], second: list[str], **columns: Any) -> list[float | None]:
    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(first, second, strict=True)]


# -- judges --------------------------------------------------------------------------------------------------------


def test_what_a_function_is_called_with() -> None:
    seen = {}

    def judge(prompts: Any, first: Any, second: Any, row: Any, **kwargs: Any) -> list[float | None]:
        seen.update(prompts=prompts, first=first, second=second, row=row)
        return [1, None]

    asked = [Comparison(X, "a", "b"), Comparison(Prompt("z", {}), "c", "d")]
    assert FunctionJudge(judge)(asked) == [1.0, None]
    assert seen == {"prompts": ["x", "z"], "first": ["a", "c"], "second": ["b", "d"], "row": [3, None]}
    assert isinstance(FunctionJudge(judge), Judge) and isinstance(WinRate(FunctionJudge(judge)), Reward)


def test_async_functions_are_awaited() -> None:
    async def judge(first: Any, **kwargs: Any) -> list[float]:
        return [0.25] * len(first)

    assert FunctionJudge(judge)([Comparison(X, "a", "b")]) == [0.25]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.2], "1.2 for P"),
        ([-0.1], "from 0 to 1"),
        ([math.nan], "nan for P"),
        (["A"], "'A' for P"),
        ([0.5, 0.5], "2 values for 1 comparisons"),
        (0.5, "returned float"),
        (None, "returned NoneType"),
    ],
)
def test_wrong_answers_of_a_function(returned: Any, said: str) -> None:
    with pytest.raises(RebelError, match=said):
        FunctionJudge(lambda **kwargs: returned, "odd")([Comparison(X, "a", "b")])


def test_a_function_that_raises_is_named_with_the_comparison_at_fault() -> None:
    def judge(first: list[str], **kwargs: Any) -> list[float]:
        if "bad" in first:
            raise ValueError("no such style")
        return [1.0] * len(first)

    with pytest.raises(
        JudgeFailed, match="the judge judge raised ValueError for 1 comparison: no such style"
    ) as failed:
        FunctionJudge(judge)([Comparison(X, "good", "b"), Comparison(X, "bad", "c")])
    assert [completion.content for _, completion in failed.value.cases] == ["bad", "c"]


def test_a_function_that_cannot_be_called_is_refused_before() -> None:
    with pytest.raises(RebelError, match=r"end its arguments with \*\*kwargs"):
        FunctionJudge(lambda first, second: [])
    with pytest.raises(RebelError, match="needs the column answer; the dataset has row"):
        WinRate(FunctionJudge(lambda answer, **kwargs: [], "j")).check([X])


def test_a_table_needs_one_order_and_does_not_guess() -> None:
    judge = table({("a", "b"): 0.8, ("b", "c"): 0.6, ("c", "b"): 0.6})
    pairs = [("a", "b"), ("b", "a"), ("c", "c"), ("a", "c"), ("b", "c"), ("c", "b")]
    answers = judge([Comparison(X, *pair) for pair in pairs])
    assert answers == [0.8, pytest.approx(0.2), 0.5, None, 0.6, 0.6]
    with pytest.raises(RebelError, match=r"P\(a > b\) = 2; use a number from 0 to 1"):
        table({("a", "b"): 2.0})


def test_a_table_in_a_file(tmp_path: Path) -> None:
    rows = [{"first": "a", "second": "b", "p": 0.7}, {"prompt": "x", "first": "a", "second": "b", "p": 0.1}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    judge = load_judge(str(tmp_path / "t.json"))
    assert judge([Comparison(X, "a", "b"), Comparison(Prompt("other"), "b", "a")]) == [0.1, pytest.approx(0.3)]
    (tmp_path / "t.jsonl").write_text('{"first": "a", "second": "b"}\n')
    with pytest.raises(RebelError, match="row 1 is not"):
        table_of_file(tmp_path / "t.jsonl")
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(RebelError, match="is not JSON"):
        table_of_file(tmp_path / "t.json")
    with pytest.raises(RebelError, match="cannot be read: No such file"):
        load_judge("nowhere.json")


def test_a_reward_is_a_judge_by_bradley_and_terry() -> None:
    rewards = {"a": 2.0, "b": -1.0, "c": None, "far": -2000.0}
    reward = PerCompletion(lambda completions, **kwargs: [rewards[y] for y in completions], "r")
    answers = BradleyTerry(reward)([Comparison(X, *pair) for pair in ("ab", "ba", "ac")] + [Comparison(X, "a", "far")])
    assert answers[:2] == [pytest.approx(1 / (1 + math.exp(-3))), pytest.approx(1 / (1 + math.exp(3)))]
    assert answers[2:] == [None, 1.0]


CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def letters(chat: bool) -> Any:
    """A tokenizer that knows the answers A and B."""
    made = tiny.tokenizer(chat=chat)
    made.add_tokens(["A", "B"])
    if chat:
        made.chat_template = CHAT
    return made


def judge_model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {**tiny.GROUPED, "vocab_size": 64, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("chat", [False, True])
def test_a_language_model_judges_by_its_next_token(chat: bool) -> None:
    model, tokenizer = judge_model(), letters(chat)
    judge = LanguageModelJudge(model, tokenizer, template="{prompt} w1 {first} w2 {second}", device="cpu")
    pairs = [("w3", "w4 w5 w6"), ("w7 w8", "w9"), ("w1 " * 200, "w2")]
    answers = judge([Comparison(Prompt("w0"), *pair) for pair in pairs])
    assert answers[2] is None, "longer than the model"
    for (first, second), p in zip(pairs[:2], answers, strict=False):
        text = f"w0 w1 {first} w2 {second}"
        start = f"user {text} assistant" if chat else f"{text} Answer:"
        ids = tokenizer(start, return_tensors="pt", add_special_tokens=False)["input_ids"]
        a, b = tokenizer.convert_tokens_to_ids(["A", "B"])
        logits = model(input_ids=ids).logits[0, -1].double()
        assert p == pytest.approx(float((logits[a] - logits[b]).sigmoid()), abs=1e-5)


def test_a_model_without_the_letters_is_refused() -> None:
    with pytest.raises(RebelError, match="does not tell the answers A and B apart"):
        LanguageModelJudge(judge_model(), tiny.tokenizer(), device="cpu")


def test_models_by_folder(tmp_path: Path) -> None:
    config = LlamaConfig(**tiny.GROUPED, num_labels=1)
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tiny.tokenizer().save_pretrained(tmp_path / "rm")
    judge_model().save_pretrained(tmp_path / "lm")
    letters(True).save_pretrained(tmp_path / "lm")
    asked = [Comparison(Prompt("w1 "), "w2", "w3 w4")]
    reward = RewardModel(tmp_path / "rm", device="cpu")
    one, two = (reward([Rollout(Prompt("w1 "), (Completion(y, None),))])[0].rewards for y in ("w2", "w3 w4"))
    assert one is not None and two is not None
    answer = load_judge(str(tmp_path / "rm"), device="cpu")(asked)[0]
    assert answer == pytest.approx(float((one - two).sigmoid()), abs=1e-6)
    assert isinstance(model_judge(str(tmp_path / "lm"), device="cpu"), LanguageModelJudge)
    tiny.tokenizer().save_pretrained(tmp_path / "empty")
    with pytest.raises(RebelError, match=r"--judge .* cannot be loaded"):
        model_judge(str(tmp_path / "empty"))


def test_judges_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def judge(first, **kwargs):\n    return [1.0] * len(first)\n")
    assert load_judge(f"{tmp_path}/mine.py:judge")([Comparison(X, "a", "b")]) == [1.0]
    with pytest.raises(RebelError, match=r"--judge .*mine.py:jugde: there is no 'jugde' in it .did you mean judge"):
        load_judge(f"{tmp_path}/mine.py:jugde")
    for spec in ("nothing", "openai:"):
        with pytest.raises(RebelError, match=f"--judge {spec}"):
            load_judge(spec)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(RebelError, match="environment variable OPENAI_API_KEY"):
        load_judge("openai:some-model")


@pytest.mark.parametrize(
    ("answer", "p"),
    [
        ("A", 1.0), ("b.", 0.0), ("**B**", 0.0), ("[[A]]", 1.0), ("Tie", 0.5), ("Answer A", 1.0), ("<B>\n", 0.0),
        ("They differ.\nThe better answer is B.", 0.0), ("Verdict: **A**", 1.0), ("Better: tie", 0.5),
        ("", None), ("A or B", None), ("A good question", None), ("Both are fine", None), ("C", None),
        ("I would say the second", None),
    ],
)  # fmt: skip
def test_answers_are_understood_or_left_alone(answer: str, p: float | None) -> None:
    assert verdict(answer) == p


def test_the_question_holds_what_is_compared_and_nothing_else_is_filled_in(tmp_path: Path) -> None:
    asked = question(TEMPLATE, Comparison(Prompt("{first}?"), "a {second} b", [{"role": "assistant", "content": "c"}]))
    assert "[Request]\n{first}?\n" in asked and "[Answer A]\na {second} b\n" in asked and "[Answer B]\nc\n" in asked
    assert as_text([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]) == "user: u\nassistant: a"
    (tmp_path / "t.txt").write_text("{prompt} {first}")
    with pytest.raises(RebelError, match=r"lacks {second}"):
        template_of(str(tmp_path / "t.txt"))
    with pytest.raises(RebelError, match="no such file"):
        template_of("nowhere.txt")


# -- both orders ---------------------------------------------------------------------------------------------------


def test_both_orders_are_averaged_and_contradictions_measured() -> None:
    judge = table({("a", "b"): 0.9, ("b", "a"): 0.4, ("a", "c"): 1.0, ("b", "c"): 0.3})
    found = ask(judge, [Comparison(X, *pair) for pair in ("ab", "ac", "bc", "cd")])
    assert found.probabilities == [pytest.approx(0.75), 1.0, pytest.approx(0.3), None]
    assert found.metrics["swap_gap"] == pytest.approx(0.1) and found.metrics["contradictions"] == 0
    assert found.metrics["unanswered"] == 0.25


def test_a_judge_that_likes_the_first_place_is_found_out_and_has_no_say() -> None:
    first = FunctionJudge(lambda first, **kwargs: [1.0] * len(first), "first")
    found = ask(first, [Comparison(X, "a", "b"), Comparison(X, "c", "d")])
    assert found.probabilities == [0.5, 0.5]
    assert found.metrics == {"unanswered": 0, "swap_gap": 1.0, "contradictions": 1.0}
    assert ask(first, [Comparison(X, "a", "b")] * 4, swap=False).probabilities == [1.0, 0.0, 1.0, 0.0]


def test_where_one_order_has_no_answer_the_other_counts() -> None:
    half = FunctionJudge(lambda first, **kwargs: [0.8 if y == "a" else None for y in first], "half")
    assert ask(half, [Comparison(X, "a", "b"), Comparison(X, "b", "a")]).probabilities == [0.8, pytest.approx(0.2)]


# -- win rates -----------------------------------------------------------------------------------------------------


def test_win_rates_of_a_group() -> None:
    expected = [(0.5 + 1.0 + 0.2) / 3, (0.0 + 0.5 + 0.9) / 3, (0.8 + 0.1 + 0.5) / 3]
    assert rates(WinRate(table()), "r", "s", "p") == pytest.approx(expected)
    assert rates(WinRate(table(), unit="advantage"), "r", "s", "p") == pytest.approx([2 * p - 1 for p in expected])
    assert rates(WinRate(table()), "r", "r", "s") == pytest.approx([2 / 3, 2 / 3, 1 / 6])
    assert rates(WinRate(table()), "r") == [0.5]


def test_completions_of_other_sources_are_judged_and_are_nobodys_opponent() -> None:
    assert rates(WinRate(table()), "r", "s", "p", others=1) == pytest.approx([0.75, 0.25, (0.8 + 0.1) / 2])
    with pytest.raises(RebelError, match="against completions of the policy"):
        rates(WinRate(table()), "r", "s", others=2)


def test_what_has_no_answer_is_left_out_of_the_mean() -> None:
    known = table({("a", "b"): 1.0, ("c", "a"): 1.0})
    assert rates(WinRate(known), "a", "b", "c") == pytest.approx([(0.5 + 1 + 0) / 3, 0.5 / 2, 1.5 / 2])
    lonely = rates(WinRate(known), "a", "b", "z")
    assert lonely[:2] == pytest.approx([0.75, 0.25]) and math.isnan(lonely[2])
    shared = rates(WinRate(known, opponents="shared"), "b", "a", "c")
    assert shared[:2] == [0.5, 1.0] and math.isnan(shared[2])


def test_the_judge_is_asked_no_more_than_it_must_be() -> None:
    asked: list[tuple[str, str]] = []

    def count(first: list[str], second: list[str], **kwargs: Any) -> list[float]:
        asked.extend(zip(first, second, strict=True))
        return [1.0] * len(first)

    judge = FunctionJudge(count)
    for settings, calls in [({}, 12), ({"swap": False}, 6), ({"opponents": "shared", "swap": False}, 3)]:
        asked.clear()
        WinRate(judge, **settings)([rollout("a", "b", "c", "d")])
        assert len(asked) == calls
    asked.clear()
    WinRate(judge, swap=False)([rollout("a", "b", "x", "y", others=2)])
    assert len(asked) == 5, "x and y are not compared with each other"


def minimiser(reward: WinRate, policy: dict[str, float], size: int, step: float, others: str = "") -> torch.Tensor:
    """log pi_{t+1} - log pi_t up to a constant: the exact least squares over every group that can be drawn."""
    actions = list(policy)
    anchor = torch.tensor(list(policy.values()), dtype=torch.float64).log()

    def loss(theta: torch.Tensor) -> torch.Tensor:
        total = theta.new_zeros(())
        for drawn in itertools.product(actions, repeat=size):
            chance = math.prod(policy[y] for y in drawn)
            contents = [*drawn, *others]
            places = [actions.index(y) for y in contents]
            (scored,) = reward([rollout(*contents, others=len(others))])
            batch = regression_batch(scored, all_pairs, anchor[places])
            total = total + chance * rebel_loss((anchor + theta)[places], batch, step)
        return total

    zero = torch.zeros_like(anchor)
    hessian: Any = torch.autograd.functional.hessian(loss, zero)
    gradient = torch.autograd.functional.jacobian(loss, zero)
    assert isinstance(gradient, torch.Tensor)
    return -torch.linalg.pinv(hessian) @ gradient


@pytest.mark.parametrize("opponents", ["group", "shared"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("unit", "factor"), [("win_rate", 1.0), ("advantage", 2.0)])
def test_the_regression_is_exactly_that_of_the_win_rate_against_the_policy(
    opponents: Any, size: int, unit: Any, factor: float
) -> None:
    policy, step = {"r": 0.6, "s": 0.3, "p": 0.1}, 2.0
    judge = table()
    against = [sum(q * judge.probability(y, z) for z, q in policy.items()) for y in policy]  # type: ignore[operator]
    wanted = step * factor * torch.tensor(against, dtype=torch.float64)
    moved = minimiser(WinRate(judge, unit=unit, opponents=opponents, swap=False), policy, size, step)
    torch.testing.assert_close(moved - moved.mean(), wanted - wanted.mean(), atol=1e-6, rtol=0)


def test_the_shared_opponent_has_the_same_mean_and_more_variance() -> None:
    policy = {"r": 0.6, "s": 0.3, "p": 0.1}
    group, shared = WinRate(table()), WinRate(table(), opponents="shared")
    drawn = [(math.prod(policy[y] for y in ys), ys) for ys in itertools.product(policy, repeat=3)]
    for y in policy:
        for place in range(3):
            own = [(chance, ys) for chance, ys in drawn if ys[place] == y]
            total = sum(chance for chance, _ in own)
            means = [sum(c * rates(r, *ys)[place] for c, ys in own) / total for r in (group, shared)]
            if place:  # the first completion is the opponent itself, and has 1/2
                assert means[0] == pytest.approx((2 * means[1] + 0.5) / 3, abs=1e-6)  # one of three is oneself
            else:
                assert means[1] == 0.5
    spread = [sum(c * torch.tensor(rates(r, *ys)).double().var() for c, ys in drawn) for r in (group, shared)]
    assert spread[0] < spread[1]


def test_metrics_of_the_judge_reach_the_notes_and_the_weighted_sum_takes_it() -> None:
    notes = Notes()
    judge = FunctionJudge(longer, notes=notes)
    length = PerCompletion(lambda completions, **kwargs: [float(len(y)) for y in completions], "length")
    (scored,) = Weighted([length, WinRate(judge, notes=notes)], [0.5, 2.0])([rollout("a", "bbb")])
    assert scored.rewards is not None
    assert scored.rewards.tolist() == pytest.approx([0.5 + 2 * 0.25, 1.5 + 2 * 0.75])
    assert scored.components["longer"].tolist() == pytest.approx([0.25, 0.75])
    assert notes.take_metrics() == {"judge/unanswered": 0, "judge/swap_gap": 0, "judge/contradictions": 0}


def test_evaluations_are_against_what_was_seen_first(tmp_path: Path) -> None:
    judge = WinRate(FunctionJudge(longer))
    first = AgainstFirst(judge, tmp_path / "run" / "opponents.jsonl")
    assert rates(first, "aa", "b") == [0.75, 0.25]
    assert rates(first, "aaa", "aa", "c") == pytest.approx([1.0, 0.75, 0.25])
    resumed = AgainstFirst(WinRate(FunctionJudge(longer)), tmp_path / "run" / "opponents.jsonl")
    assert rates(resumed, "aaa") == [1.0]
    assert judge.notes.take_metrics()["judge/swap_gap"] == 0
