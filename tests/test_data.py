"""Prompts from files and data sets, in an order known from the seed; and what is said of data that will not do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset, DatasetDict

from rebel.build.prompts import build_prompts, fitting
from rebel.config import RebelConfig
from rebel.data import PromptStream, load_prompts, prompts_of, seed_of, shuffled, that_fit
from rebel.errors import RebelError
from rebel.policies.causal_lm import causal_lm
from rebel.types import Prompt

ROWS = [{"prompt": f"text {k}", "answer": k} for k in range(5)]
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def as_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def as_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def as_csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS))
    return path


def as_parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_saved(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def as_splits(folder: Path) -> Path:
    DatasetDict(train=Dataset.from_list(ROWS), other=Dataset.from_list(ROWS[:2])).save_to_disk(folder / "splits")
    return folder / "splits"


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv, as_parquet, as_saved, as_splits])
def test_rows_of_every_format_become_prompts_with_their_other_columns(write: Callable, tmp_path: Path) -> None:
    prompts = load_prompts(str(write(tmp_path)), "train", "prompt")
    assert prompts == [Prompt(row["prompt"], {"answer": row["answer"]}) for row in ROWS]


def test_lines_of_text_are_prompts(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo words\n")
    assert load_prompts(str(tmp_path / "lines.txt"), "train", "prompt") == [Prompt("one"), Prompt("two words")]


def test_chat_messages_come_through_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"question": CHAT, "id": 7}) + "\n")
    assert load_prompts(str(path), "train", "question") == [Prompt(CHAT, {"id": 7})]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "has no rows"),
        ([{"question": "x", "id": 1}], "has no column 'prompt'; it has question, id: set --prompt_column"),
        ([{"prompt": "x"}, {"prompt": 3}], "row 1: prompt is int"),
        ([{"prompt": "x"}, {"prompt": None}], "row 1: prompt is NoneType"),
        ([{"prompt": "x"}, {"prompt": "  \n"}], "row 1: prompt is empty"),
        ([{"prompt": []}], "row 0: prompt is empty"),
        ([{"prompt": [{"role": "user"}]}], "row 0: prompt is list"),
        ([{"prompt": ["Hello"]}], "row 0: prompt is list"),
    ],
)
def test_rows_that_will_not_do_are_named(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RebelError, match=words):
        prompts_of(rows, "prompt", "my.jsonl")


def test_files_that_will_not_do_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"prompt":\n')
    (tmp_path / "rows.xlsx").write_text("x")
    cases = {
        "empty.jsonl": "the file is empty",
        "broken.jsonl": "could not read the split 'train'",
        "rows.xlsx": ".xlsx is none of .jsonl",
    }
    for name, words in cases.items():
        with pytest.raises(RebelError, match=words) as refused:
            load_prompts(str(tmp_path / name), "train", "prompt")
        assert name in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(RebelError, match="has no split 'test'; it has train, other"):
        load_prompts(str(as_splits(tmp_path)), "test", "prompt")
    with pytest.raises(RebelError, match=r"--dataset_name .*nowhere.jsonl: there is no such file"):
        load_prompts(str(tmp_path / "nowhere.jsonl"), "train", "prompt")


# -- training and evaluation -------------------------------------------------------------------------------------------


def test_the_first_rows_are_kept_for_evaluation_unless_there_is_a_split(tmp_path: Path) -> None:
    rows = RebelConfig(dataset_name=str(as_jsonl(tmp_path)), eval_prompts=2)
    training, held_out = build_prompts(rows)
    assert [p.content for p in held_out] == ["text 0", "text 1"]
    assert [p.content for p in training] == ["text 2", "text 3", "text 4"]
    splits = RebelConfig(dataset_name=str(as_splits(tmp_path)), eval_prompts=64, dataset_test_split="other")
    training, held_out = build_prompts(splits)
    assert (len(training), len(held_out)) == (5, 2)
    training, held_out = build_prompts(RebelConfig(dataset_name=str(tmp_path / "rows.jsonl"), eval_prompts=0))
    assert (len(training), len(held_out)) == (5, 0)
    with pytest.raises(RebelError, match="--eval_prompts 5 leaves none of the 5 prompts for training"):
        build_prompts(RebelConfig(dataset_name=str(tmp_path / "rows.jsonl"), eval_prompts=5))


def test_prompts_that_do_not_fit_are_dropped_and_counted_and_never_cut() -> None:
    prompts = tiny.prompts(3, 9, 5, 6)
    kept, dropped = that_fit(prompts, lambda prompt: prompt.content.split(), 5)
    assert kept == [prompts[0], prompts[2]] and dropped == 2
    with pytest.raises(RebelError, match="every one of the 4 prompts is longer than --max_prompt_length 2"):
        that_fit(prompts, lambda prompt: prompt.content.split(), 2)


def test_room_for_prompts_is_what_the_model_and_the_settings_leave() -> None:
    policy = tiny.policy()  # 64 positions
    prompts = tiny.prompts(10, 14, 15, 30)
    for settings, count in (({"max_prompt_length": 14}, 2), ({"max_completion_length": 50}, 2), ({}, 4)):
        given = {"max_completion_length": 20, "max_prompt_length": 40} | settings
        kept, dropped = fitting(prompts, policy, RebelConfig(**given))
        assert (len(kept), dropped) == (count, 4 - count)
    with pytest.raises(RebelError, match="--max_completion_length 64 leaves no room for a prompt"):
        fitting(prompts, policy, RebelConfig(max_completion_length=64))
    with pytest.raises(RebelError, match="--tokens_per_micro_batch 50 is less than one completion may need"):
        fitting(prompts, policy, RebelConfig(max_completion_length=20, tokens_per_micro_batch=50))


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(RebelError, match="the tokenizer has no chat template"):
        fitting([Prompt(CHAT)], tiny.policy(), RebelConfig())
    chat = causal_lm(tiny.model(), tiny.tokenizer(chat=True))
    kept, _ = fitting([Prompt(CHAT)], chat, RebelConfig(max_completion_length=8))
    assert kept == [Prompt(CHAT)]


# -- the order --------------------------------------------------------------------------------------------------------


def test_every_pass_takes_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(tiny.prompts(*range(1, 12)), seed=3)
    taken = [prompt.meta["row"] for prompt in stream.take(0, 33)]
    laps = [taken[k : k + 11] for k in (0, 11, 22)]
    assert all(sorted(lap) == list(range(11)) for lap in laps)
    assert laps[0] != laps[1] != laps[2] and laps[0] != sorted(laps[0])


def test_the_stream_is_the_same_wherever_one_enters_it() -> None:
    stream = PromptStream(tiny.prompts(*range(1, 12)), seed=3)
    whole = stream.take(0, 40)
    assert [p for start in range(0, 40, 7) for p in stream.take(start, min(7, 40 - start))] == whole
    assert PromptStream(stream.prompts, seed=3).take(20, 5) == whole[20:25]
    assert PromptStream(stream.prompts, seed=4).take(0, 11) != whole[:11]
    assert stream.take(5, 0) == []


def test_seeds_of_neighbouring_numbers_are_unrelated_and_fit_a_generator() -> None:
    seeds = [seed_of(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2) != seed_of(2, 1) and seed_of(0) != seed_of(0, 0)
    low_bits = Counter(seed % 8 for seed in seeds)
    assert max(low_bits.values()) < 1.4 * len(seeds) / 8


def test_shuffling_is_a_permutation_known_from_its_seeds() -> None:
    assert sorted(shuffled(50, 1, 2)) == list(range(50))
    assert shuffled(50, 1, 2) == shuffled(50, 1, 2) != shuffled(50, 1, 3)
