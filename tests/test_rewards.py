"""Rewards: the convention of TRL's functions, what happens to bad values, weights and scales, models, names."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from rebel.errors import RebelError
from rebel.rewards.checks import exact_match
from rebel.rewards.combine import PerCompletion, Weighted
from rebel.rewards.functions import Notes, RewardFailed
from rebel.rewards.groups import drop_unfinished, flat, in_groups, penalise_unfinished, scaled, usable
from rebel.rewards.load import as_reward, load_reward
from rebel.rewards.models import RewardModel
from rebel.types import Completion, Prompt, Rollout, Scored, TokenTrace

DATA = Path(os.environ.get("REBEL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def rollout(*texts: str, prompt: object = "x", finished: tuple[bool, ...] | None = None, **meta: object) -> Rollout:
    """A prompt with completions of these texts; messages where the prompt is a chat."""
    chat = isinstance(prompt, list)
    completions = tuple(
        Completion(
            content=[{"role": "assistant", "content": text}] if chat else text,
            trace=TokenTrace(prompt=(1, 2), completion=tuple(len(word) for word in text.split())),
            finished=True if finished is None else finished[k],
        )
        for k, text in enumerate(texts)
    )
    return Rollout(Prompt(prompt, meta), completions)


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def constant(*values):
    """A reward function that returns these values, whatever it is given."""

    def returns(**kwargs):
        return list(values)

    return returns


def rewards_of(reward, *rollouts: Rollout) -> list[float]:
    return torch.cat([scored.rewards for scored in reward(rollouts)]).tolist()


def group(*rewards: float, finished: tuple[bool, ...] | None = None) -> Scored:
    return Scored(rollout(*map(str, rewards), finished=finished), rewards=torch.tensor(rewards))


def judged(margins: list[list[float]], finished: tuple[bool, ...] | None = None) -> Scored:
    return Scored(rollout(*"abcdefg"[: len(margins)], finished=finished), margins=torch.tensor(margins))


CHAT = [{"role": "user", "content": "how many"}]


# -- functions ---------------------------------------------------------------------------------------------


def test_a_function_is_called_once_with_everything_by_name():
    calls = []

    def record(**kwargs):
        calls.append(kwargs)
        return range(5)

    first = rollout("one two", "three", prompt=CHAT, answer=7, completion="of the dataset")
    second = rollout("four", "five", "six", prompt="plain", answer=8, prompts="of the dataset")
    scored = PerCompletion(record)([first, second])
    (call,) = calls
    assert call["prompts"] == [CHAT, CHAT, "plain", "plain", "plain"]
    assert call["completions"][1] == [{"role": "assistant", "content": "three"}]
    assert call["completions"][2:] == ["four", "five", "six"]
    assert call["completion_ids"] == [[3, 3], [5], [4], [4], [3]]
    assert call["answer"] == [7, 7, 8, 8, 8]
    assert "completion" not in call
    assert [s.rewards.tolist() for s in scored] == [[0, 1], [2, 3, 4]]
    assert [s.components["record"].tolist() for s in scored] == [[0, 1], [2, 3, 4]]


def test_a_column_that_some_rows_lack_is_none_for_them():
    def shows(note, **kwargs):
        return [0.0 if value is None else 1.0 for value in note]

    assert rewards_of(PerCompletion(shows), rollout("a", "b", note="n"), rollout("c")) == [1, 1, 0]


def test_functions_of_trl_work_unchanged():
    chat = rollout("<think>\nwell\n</think>\n4", "4", prompt=CHAT)
    assert rewards_of(PerCompletion(think_format_reward), chat) == [1, 0]
    overlong = PerCompletion(get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2))
    assert overlong.name == "soft_overlong_punishment_reward"
    assert rewards_of(overlong, rollout("a b", "a b c", "a b c d e")) == [0, -0.5, -1]
    repetition = PerCompletion(get_repetition_penalty_reward(ngram_size=1))
    assert rewards_of(repetition, rollout("a bb", "a a a a")) == [0, -0.75]


def test_accuracy_reward_of_trl_where_its_parser_is_installed():
    pytest.importorskip("math_verify", reason="accuracy_reward needs math-verify")
    chat = rollout(r"\boxed{\frac{1}{2}}", r"\boxed{0.7}", prompt=CHAT, solution=r"$\frac{1}{2}$")
    assert rewards_of(load_reward("accuracy_reward"), chat) == [1, 0]
    assert all(
        math.isnan(r) for r in rewards_of(load_reward("accuracy_reward"), rollout("x", prompt=CHAT, solution=""))
    )


def test_functions_read_the_run_and_write_into_its_notes():
    notes = Notes()
    notes.trainer_state.global_step = 3

    def logs(completions, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("shown", completions)
        log_metric("step", trainer_state.global_step)
        log_metric("step", 4)
        return [0.0] * len(completions)

    PerCompletion(logs, notes=notes)([rollout("a", "b")])
    assert notes.columns == {"shown": ["a", "b"]}
    assert notes.take_metrics() == {"step": 3.5}
    assert notes.take_metrics() == {}
    notes.log_metric("step", 1)
    of_another = {"step": [2, 6], "theirs": [7]}
    assert notes.take_metrics(lambda own: [*own, of_another]) == {"step": 3, "theirs": 7}, "means over all processes"


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0.01)
        return [2.0 * len(completion) for completion in completions]


async def async_length(completions, factor=1.0, **kwargs):
    await asyncio.sleep(0.01)
    return [factor * len(completion) for completion in completions]


@pytest.mark.parametrize(
    "fn",
    [AsyncJudge(), functools.partial(AsyncJudge()), async_length, functools.partial(async_length, factor=2.0)],
)
def test_async_functions_objects_and_partials(fn):
    factor = 1.0 if fn is async_length else 2.0
    assert rewards_of(PerCompletion(fn), rollout("a", "bbb")) == [factor, 3 * factor]


def test_async_functions_work_where_a_loop_is_already_running():
    async def notebook():
        return rewards_of(Weighted([PerCompletion(async_length), PerCompletion(length)]), rollout("a", "bb"))

    assert asyncio.run(notebook()) == [2, 4]


def test_async_functions_run_together_and_beside_the_sync_ones():
    async def first(completions, **kwargs):
        reached["first"].set()
        await asyncio.wait_for(reached["second"].wait(), 5)
        return [1.0] * len(completions)

    async def second(completions, **kwargs):
        reached["second"].set()
        await asyncio.wait_for(reached["first"].wait(), 5)
        progress.append("second")
        return [10.0] * len(completions)

    def sync(completions, **kwargs):
        while not progress:
            assert time.monotonic() < deadline, "the async functions wait for the sync one"
            time.sleep(0.001)
        return [100.0] * len(completions)

    reached, progress, deadline = {"first": asyncio.Event(), "second": asyncio.Event()}, [], time.monotonic() + 5
    together = Weighted([PerCompletion(sync), PerCompletion(first), PerCompletion(second)])
    assert rewards_of(together, rollout("a", "b")) == [111, 111]


def test_an_async_client_outlives_the_batch():
    loops = []

    async def client(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    reward = PerCompletion(client)
    reward([rollout("a", "b")])
    reward([rollout("c", "d")])
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_no_rollouts_need_no_call():
    def never(**kwargs):
        raise AssertionError

    assert PerCompletion(never)([]) == []
    assert Weighted([PerCompletion(never)])([]) == []


# -- wrong functions and wrong values --------------------------------------------------------------------------


def no_kwargs(completions, answer):
    return [0.0]


def by_position(completions, /, **kwargs):
    return [0.0]


class NeedsMaking:
    def __call__(self, **kwargs):
        return [0.0]


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (no_kwargs, "end its arguments with \\*\\*kwargs"),
        (by_position, "called by name"),
        (NeedsMaking, "is a class"),
        (get_soft_overlong_punishment, "takes \\(max_completion_len, soft_punish_cache\\)"),
    ],
)
def test_a_function_with_the_wrong_arguments_is_refused_at_once(fn, said):
    with pytest.raises(RebelError, match=said):
        PerCompletion(fn)


def test_a_missing_column_is_told_before_any_work():
    reward = Weighted([PerCompletion(exact_match)])
    reward.check([Prompt("x", {"answer": 1})])
    with pytest.raises(RebelError, match="exact_match needs the column answer; the dataset has answers, id"):
        reward.check([Prompt("x", {"answers": 1, "id": 2})])
    with pytest.raises(RebelError, match="the dataset has no column beside the prompt"):
        reward([rollout("a", "b")])


def test_a_function_that_names_all_it_takes_is_told_of_further_columns():
    def exact(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer):
        return [1.0] * len(completions)

    assert rewards_of(PerCompletion(exact), rollout("a", "b", answer=1)) == [1, 1]
    with pytest.raises(RebelError, match="does not take the column id"):
        PerCompletion(exact).check([Prompt("x", {"answer": 1, "id": 2})])


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([1.0], "few returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "few returned 3 values for 2 completions"),
        (1.0, "few returned float; return a list"),
        (None, "few returned NoneType; return a list"),
        ({"a": 1, "b": 2}, "few returned dict; return a list"),
        ([1.0, "2"], "few returned a value that is no number"),
        ([1.0, [2.0, 3.0]], "few returned a value that is no number"),
    ],
)
def test_wrong_answers_name_the_function_and_what_it_should_return(returned, said):
    def few(**kwargs):
        return returned

    with pytest.raises(RebelError, match=said):
        PerCompletion(few)([rollout("a", "b")])


@pytest.mark.parametrize("returned", [torch.tensor([1, 0]), (True, False), iter([1, 0])])
def test_any_row_of_numbers_is_taken(returned):
    assert rewards_of(PerCompletion(lambda **kwargs: returned), rollout("a", "b")) == [1, 0]


def picky(completions, **kwargs):
    return [1 / (completion != "bad") for completion in completions]


def test_a_function_that_raises_tells_the_completion():
    with pytest.raises(RewardFailed, match="picky raised ZeroDivisionError for 1 completion") as failure:
        PerCompletion(picky)([rollout("a", "b", prompt="first"), rollout("c", "bad", "bad", prompt="second")])
    ((prompt, completion),) = failure.value.cases
    assert failure.value.name == "picky"
    assert (prompt.content, completion.content) == ("second", "bad")
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_a_function_that_raises_on_the_whole_batch_only_tells_all_of_it():
    def pairs_only(completions, **kwargs):
        if len(completions) == 1:
            raise TypeError("needs two")
        raise ValueError("broken")

    async def broken(completions, **kwargs):
        raise ValueError("broken")

    for fn in (pairs_only, broken):
        with pytest.raises(RewardFailed, match="ValueError for one of 3 completions: broken") as failure:
            Weighted([PerCompletion(fn)])([rollout("a", "b", "c")])
        assert [completion.content for _, completion in failure.value.cases] == ["a", "b", "c"]


def test_the_search_for_the_completion_is_bounded(monkeypatch):
    monkeypatch.setattr("rebel.rewards.functions.SECONDS_OF_SEARCH", -1.0)
    with pytest.raises(RewardFailed) as failure:
        PerCompletion(picky)([rollout("a", "bad")])
    assert len(failure.value.cases) == 2


# -- weights and scales ------------------------------------------------------------------------------------------


def test_none_is_left_out_of_the_sum_and_nan_is_a_bad_value():
    nan, inf = math.nan, math.inf
    one = PerCompletion(constant(1, None, None, nan, 2, None, 5), name="one")
    two = PerCompletion(constant(10, 20, None, 30, -inf, nan, 0), name="two")
    (scored,) = Weighted([one, two], weights=[2.0, 0.5])([rollout(*"abcdefg")])
    expected = torch.tensor([7, 10, nan, nan, nan, nan, 10])
    torch.testing.assert_close(scored.rewards, expected, equal_nan=True)
    components = {
        "one": torch.tensor([1, nan, nan, nan, 2, nan, 5]),
        "two": torch.tensor([10, 20, nan, 30, nan, nan, 0]),
    }
    torch.testing.assert_close(scored.components, components, equal_nan=True)


def test_one_function_alone_gives_nan_for_none_and_for_bad_values():
    (scored,) = PerCompletion(constant(1, None, math.inf, math.nan, 1e300))([rollout(*"abcde")])
    assert scored.rewards.isnan().tolist() == [False, True, True, True, True]


def test_a_completion_that_another_reward_cannot_score_has_no_reward():
    def half(rollouts):
        return in_groups(rollouts, torch.tensor([1.0, math.nan]), {})

    assert math.isnan(rewards_of(Weighted([PerCompletion(length), half]), rollout("a", "b"))[1])


def test_functions_of_one_name_keep_components_of_their_own():
    (scored,) = Weighted([PerCompletion(constant(1, 2)), PerCompletion(constant(3, 4)), PerCompletion(length)])(
        [rollout("a", "b")]
    )
    assert {name: values.tolist() for name, values in scored.components.items()} == {
        "returns": [1, 2],
        "returns_2": [3, 4],
        "length": [1, 1],
    }


@pytest.mark.parametrize(
    ("rewards", "weights", "said"),
    [
        ([], None, "names no reward"),
        ([PerCompletion(length)], [1.0, 2.0], "gives 2 weights for 1 --reward_funcs"),
        ([PerCompletion(length)], [math.nan], "finite"),
    ],
)
def test_wrong_weights(rewards, weights, said):
    with pytest.raises(RebelError, match=said):
        Weighted(rewards, weights)


def test_margins_do_not_add_up_with_rewards():
    def judge(rollouts):
        return [judged([[0.0, 1.0], [-1.0, 0.0]])]

    with pytest.raises(RebelError, match="compares pairs"):
        Weighted([PerCompletion(length), judge])([rollout("a", "b")])
    with pytest.raises(RebelError, match="--scale_rewards group"):
        scaled([judged([[0.0, 1.0], [-1.0, 0.0]])], "group")


def trl_advantages(rewards: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """TRL's advantages of groups of one size, given the standard deviation that it divides by."""
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (std + 1e-4)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_differences_of_scaled_rewards_are_those_of_trl_advantages(scale):
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, -3.0, 30.0]])
    std = {"none": torch.tensor(1 - 1e-4), "group": rewards.std(dim=1, keepdim=True), "batch": rewards.std()}[scale]
    reward = Weighted([PerCompletion(constant(*rewards.flatten().tolist()))], scale=scale)
    margins = torch.stack([scored.pair_margins() for scored in reward([rollout(*"abc"), rollout(*"def")])])
    advantages = trl_advantages(rewards, std)
    torch.testing.assert_close(margins, advantages[:, :, None] - advantages[:, None, :])


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_scaling_leaves_equal_rewards_equal_and_passes_nan_by(scale):
    groups = scaled([group(0.1, 0.1, 0.1), group(math.nan, 5.0), group(math.nan, math.nan)], scale)
    assert flat(groups[0]) and flat(scaled([group(1e5, 1e5, 1e5)], scale)[0])
    assert scaled([group(0.1, 0.1, 0.1)], scale)[0].rewards.tolist() == group(0.1, 0.1, 0.1).rewards.tolist()
    assert groups[1].rewards.isfinite().tolist() == [False, True]
    unscaled, scaled_alone = group(1.0, 3.0), group(1.0, math.nan, 3.0)
    expected = scaled([unscaled], scale)[0].rewards
    assert scaled([scaled_alone], scale)[0].rewards[[0, 2]].tolist() == expected.tolist() != [1, 3]


# -- groups ----------------------------------------------------------------------------------------------------


def test_usable_leaves_out_completions_without_a_reward():
    scored = in_groups(
        [rollout("a", "b", "c")], torch.tensor([1.0, math.nan, 3.0]), {"f": torch.tensor([1.0, 2.0, 3.0])}
    )
    left = usable(scored[0])
    assert left.rewards.tolist() == [1, 3]
    assert left.components["f"].tolist() == [1, 3]
    assert [completion.content for completion in left.rollout.completions] == ["a", "c"]
    assert usable(group(1.0, math.nan, math.inf)) is None
    whole = group(1.0, 2.0)
    assert usable(whole) is whole


def test_usable_leaves_out_completions_that_nobody_compared():
    nan = math.nan
    left = usable(judged([[0, nan, 2.0], [nan, 0, nan], [-2.0, nan, 0]]))
    assert left.margins.tolist() == [[0, 2], [-2, 0]]
    assert [completion.content for completion in left.rollout.completions] == ["a", "c"]
    assert usable(judged([[0, nan], [nan, 0]])) is None
    infinite = usable(judged([[0, math.inf, 1.0], [-math.inf, 0, 1.0], [-1.0, -1.0, 0]]))
    assert infinite.margins.isnan().sum() == 2


def test_flat_groups():
    assert flat(group(2.0, 2.0, 2.0)) and flat(group(2.0, math.nan))
    assert not flat(group(2.0, 2.0, 2.5))
    assert flat(judged([[0.0, math.nan], [math.nan, 0.0]])) and not flat(judged([[0.0, 1.0], [-1.0, 0.0]]))


def test_unfinished_completions_are_penalised_or_dropped():
    finished = (True, False, True)
    assert penalise_unfinished(group(1.0, 2.0, 3.0, finished=finished), 1.5).rewards.tolist() == [1, 0.5, 3]
    differences = group(1.0, 2.0, 3.0).pair_margins().tolist()
    by_margin = penalise_unfinished(judged(differences, finished), 1.5)
    assert by_margin.margins.tolist() == group(1.0, 0.5, 3.0).pair_margins().tolist()
    assert drop_unfinished(group(1.0, 2.0, 3.0, finished=finished)).rewards.tolist() == [1, 3]
    assert drop_unfinished(group(1.0, 2.0, finished=(True, False))) is None


# -- verifiers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("16 - 3 = 13, so 13 * 2 = $26.", "26", 1),
        ("She has 26 apples and eats 3", "26", 0),
        ("It is 3.\n#### 26\nQ: 5 more", "26", 1),
        ("26 it is\n#### nothing", "26", 0),
        ("the sum is 1,234,567.00", 1234567, 1),
        ("we have 3,4,5", "5", 1),
        ("from 5-3", "3", 1),
        ("x = -3", "-3", 1),
        ("x = \N{MINUS SIGN}3", -3, 1),
        ("x = -3", "3", 0),
        ("about .5", "0.50", 1),
        ("a long solution\n#### 1,000", "He earns 1,000\n#### 1000", 1),
        ("  Paris\n", "paris", 1),
        ("It is Paris", "Paris", 0),
        ("thinking\n#### Paris", "Paris", 1),
        ("no number", "0", 0),
        ("", "0", 0),
        ("12", "1", 0),
    ],
)
def test_exact_match(completion, answer, right):
    assert exact_match([completion, [{"role": "assistant", "content": completion}]], [answer] * 2) == [right, right]


def test_exact_match_does_not_apply_without_an_answer():
    assert exact_match(["1", "1"], [None, 1]) == [None, 1.0]


def gsm8k(file: str) -> list[dict]:
    path = DATA / "gsm8k" / file
    if not path.is_file():
        pytest.skip(f"needs gsm8k/{file} in the data folder (REBEL_DATA)")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_exact_match_accepts_every_gsm8k_solution_and_no_shifted_answer():
    rows = gsm8k("test.jsonl")
    solutions = [f"{row['solution']}\n#### {row['answer']}" for row in rows]
    assert set(exact_match(solutions, [row["answer"] for row in rows])) == {1.0}
    assert sum(exact_match(solutions, [f"{row['answer']}1" for row in rows])) == 0


def test_exact_match_agrees_with_the_published_marks_of_real_solutions():
    rows = gsm8k("model_solutions_grouped.jsonl")
    rollouts = [rollout(*(c["text"] for c in row["completions"]), answer=row["answer"]) for row in rows]
    marks = [c["reward"] for row in rows for c in row["completions"]]
    assert rewards_of(PerCompletion(exact_match), *rollouts) == marks
    assert 0 < sum(marks) < len(marks)


# -- reward models -----------------------------------------------------------------------------------------------

WORDS = ["a", "b", "c", "d", "e", "f", "how", "many", "user", "assistant", "x", "y", "z"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"


def tokenizer(bert: bool = False, **tokens: str | None) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "</s>", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(WordLevel({word: k for k, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(special)
    if bert:
        ends = [("[CLS]", 3), ("[SEP]", 4)]
        words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>", **tokens)


SIZE = {"vocab_size": 5 + len(WORDS), "num_labels": 1, "initializer_range": 0.5}


def llama_config(**settings) -> LlamaConfig:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**{**SIZE, **size, "max_position_embeddings": 24, "pad_token_id": None, **settings})


def make(kind: str) -> RewardModel:
    torch.manual_seed(0)
    if kind == "llama":
        return RewardModel(LlamaForSequenceClassification(llama_config()), tokenizer(), tokens_per_batch=40)
    if kind == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=24, resid_pdrop=0.5, **SIZE)
        return RewardModel(GPT2ForSequenceClassification(config), tokenizer(pad_token="[PAD]"), tokens_per_batch=40)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(max_position_embeddings=24, hidden_dropout_prob=0.5, **size, **SIZE)
    return RewardModel(
        BertForSequenceClassification(config), tokenizer(bert=True, pad_token="[PAD]"), tokens_per_batch=40
    )


KINDS = ["llama", "gpt2", "bert"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["how many ", CHAT], ids=["text", "chat"])
def test_scores_in_batches_are_those_of_one_by_one(kind, prompt):
    reward = make(kind)
    reward.tokenizer.chat_template = TEMPLATE
    texts = ["a", "b c d e f a b", "x y", "z", "a b c", "f e d c b a x y z", "c c c c"]
    together = rewards_of(reward, rollout(*texts[:3], prompt=prompt), rollout(*texts[3:], prompt=prompt))
    alone = [reward_alone(reward, prompt, text) for text in texts]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=1e-5, rtol=0)
    assert len(set(together)) == len(texts)
    assert rewards_of(reward, rollout(*texts, prompt=prompt)) == pytest.approx(together, abs=1e-5)


def reward_alone(reward: RewardModel, prompt: object, text: str) -> float:
    """The score of one text without any padding, the template written out by hand."""
    if isinstance(prompt, str):
        ids = reward.tokenizer(prompt + text)["input_ids"]
    else:
        ids = reward.tokenizer(f"user how many </s> assistant {text} </s> ", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return float(reward.model(input_ids=torch.tensor([ids])).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_into_the_model_is_not_cut(kind):
    words = 22 if kind == "bert" else 24  # [CLS] and [SEP] take two of the 24 positions
    fits, too_long = " ".join(["a"] * (words - 2)), " ".join(["a"] * (words - 1))
    scores = rewards_of(make(kind), rollout(fits, too_long, "a", prompt="how many "))
    assert [math.isnan(score) for score in scores] == [False, True, False]


def test_plain_text_gets_the_special_tokens_of_the_tokenizer_and_nothing_else():
    prompt, completion = Prompt("how many "), Completion("a", TokenTrace((), ()))
    assert make("bert").ids(prompt, completion) == [3, 11, 12, 5, 4]
    assert make("llama").ids(prompt, completion) == [11, 12, 5]


def test_a_missing_pad_token_is_the_end_of_text_for_tokenizer_and_model():
    reward = make("llama")
    assert (reward.pad_id, reward.tokenizer.pad_token, reward.model.config.pad_token_id) == (1, "</s>", 1)
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(RebelError, match="neither a padding nor an end-of-text token"):
        RewardModel(LlamaForSequenceClassification(llama_config()), without)


def test_batches_hold_no_more_tokens_than_said(monkeypatch):
    reward, shapes = make("gpt2"), []
    forward = reward.model.forward
    monkeypatch.setattr(
        reward.model, "forward", lambda input_ids, **kw: shapes.append(input_ids.shape) or forward(input_ids, **kw)
    )
    rewards_of(reward, rollout(*(" ".join(["a"] * n) for n in (1, 8, 8, 3, 8, 8, 8, 8, 2)), prompt="x "))
    assert sum(rows for rows, _ in shapes) == 9 and len(shapes) > 1
    assert all(rows * columns <= 40 for rows, columns in shapes)


def test_chats_need_a_chat_template():
    with pytest.raises(RebelError, match="no chat template"):
        make("llama")([rollout("a", "b", prompt=CHAT)])
    with pytest.raises(RebelError, match="no chat template"):
        Weighted([make("llama")]).check([Prompt("text"), Prompt(CHAT)])


def test_a_saved_reward_model_is_loaded_by_its_folder(tmp_path, monkeypatch):
    reward = make("llama")
    reward.model.save_pretrained(tmp_path / "judge.v2")
    reward.tokenizer.save_pretrained(tmp_path / "judge.v2")
    monkeypatch.chdir(tmp_path)
    loaded = load_reward("judge.v2", device="cpu")
    assert loaded.name == "judge.v2" and not loaded.model.training
    group_of_two = rollout("a b c", "d", prompt="x ")
    assert rewards_of(loaded, group_of_two) == pytest.approx(rewards_of(reward, group_of_two))
    given = as_reward(reward.model, tokenizer=reward.tokenizer)
    assert rewards_of(given, group_of_two) == pytest.approx(rewards_of(reward, group_of_two))


def test_models_that_are_no_reward_models(tmp_path):
    tokenizer(pad_token="[PAD]").save_pretrained(tmp_path)
    with pytest.raises(RebelError, match="its reward model cannot be loaded"):
        load_reward(str(tmp_path))
    LlamaForCausalLM(llama_config(num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(RebelError, match="LlamaForCausalLM with 2 labels"):
        load_reward(str(tmp_path))
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    with pytest.raises(RebelError, match=r"lacks the weights score\.weight"):
        load_reward(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RebelError, match="its tokenizer cannot be loaded"):
        load_reward(str(tmp_path / "empty"))


# -- names -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a file of rewards that imports a neighbour."""
    (tmp_path / "my_rewards.py").write_text(
        "from neighbour_of_rewards import ONE\n"
        "LOADED = []\n"
        "def ones(completions, **kwargs):\n    return [ONE] * len(completions)\n"
        "def twos(completions, **kwargs):\n    LOADED.append(2)\n    return [2 * ONE] * len(completions)\n"
        "WEIGHT = 3.0\n"
    )
    (tmp_path / "neighbour_of_rewards.py").write_text("ONE = 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_rewards", "neighbour_of_rewards", "rebel_reward_my_rewards", "broken_rewards"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("spec", ["my_rewards.py:ones", "./my_rewards.py:ones", "my_rewards:ones", "my_rewards.ones"])
def test_functions_in_files_and_modules(folder, spec):
    reward = load_reward(spec)
    assert reward.name == "ones"
    assert rewards_of(reward, rollout("a", "b")) == [1, 1]


def test_a_file_is_run_once_for_all_its_functions_and_again_when_it_changes(folder):
    first, second = load_reward("my_rewards.py:ones"), load_reward("my_rewards.py:twos")
    assert first.fn.__globals__ is second.fn.__globals__
    (folder / "my_rewards.py").write_text("def ones(completions, **kwargs):\n    return [9] * len(completions)\n")
    os.utime(folder / "my_rewards.py", ns=(1, 1))
    assert rewards_of(load_reward("my_rewards.py:ones"), rollout("a", "b")) == [9, 9]


def test_functions_by_name():
    assert load_reward("think_format_reward").fn is think_format_reward
    assert load_reward("exact_match").fn is exact_match
    assert as_reward(length).fn is length


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("missing.py:ones", "there is no file missing.py"),
        ("my_rewards.py", "names no function of that file; give my_rewards.py:function"),
        ("my_rewards.py:onse", r"there is no 'onse' in it \(did you mean ones\?\)"),
        ("my_rewards.py:WEIGHT", "is of type float, not a function"),
        ("my_rewards:onse", r"did you mean ones\?"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("broken_rewards.py:f", "cannot be imported: ZeroDivisionError: division by zero"),
        ("think_format_rewrd", r"neither a function nor a model \(did you mean think_format_reward\?\)"),
        ("./no_such_folder", "neither a function nor a model"),
        ("get_soft_overlong_punishment", "makes a reward function from its settings"),
    ],
)
def test_names_that_lead_nowhere(folder, spec, said):
    (folder / "broken_rewards.py").write_text("def f(**kwargs):\n    return []\n1 / 0\n")
    with pytest.raises(RebelError, match=said):
        load_reward(spec)


def test_a_file_with_a_syntax_error_or_that_exits(folder):
    (folder / "broken_rewards.py").write_text("def f(:\n")
    with pytest.raises(RebelError, match=r"cannot be imported: SyntaxError: .*line 1"):
        load_reward("broken_rewards.py:f")
    (folder / "broken_rewards.py").write_text("raise SystemExit('usage: not a library')\n")
    os.utime(folder / "broken_rewards.py", ns=(1, 1))
    with pytest.raises(RebelError, match="cannot be imported: SystemExit: usage: not a library"):
        load_reward("broken_rewards.py:f")


def test_accuracy_reward_says_which_package_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RebelError, match=r'pip install "rebel-rl\[math\]"'):
        load_reward("accuracy_reward")
