"""The example files: all of them are valid, and all of them run, the large ones with small models in their place."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
from conftest import DATA
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

import rebel
from rebel.cli import main
from rebel.config import RebelConfig
from rebel.rewards.load import load_reward
from rebel.settings import read_yaml, resolve
from rebel.types import Completion, Prompt, Rollout
from rebel.validate import validate

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SMALL = {
    "prompts_per_iteration": 6,
    "num_generations": 4,
    "steps_per_iteration": 2,
    "max_completion_length": 16,
    "iterations": 2,
    "eval_prompts": 4,
    "eval_generations": 1,
    "learning_rate": 1e-4,
    "use_cpu": "true",
}
Train = Callable[..., list[dict]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run `rebel train` on an example with the flags of a small run over it; gives the rows of its metrics."""
    monkeypatch.chdir(ROOT)

    def run(example: str, **flags: object) -> list[dict]:
        given = {**SMALL, **flags, "output_dir": tmp_path / "run"}
        words = [f"--{name}={value}" for name, value in given.items()]
        assert main(["train", f"examples/{example}", *words]) == 0, capsys.readouterr().err
        assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def first_sentences(tmp_path: Path) -> Path:
    """Real prompts: 80 first sentences of stories."""
    source = DATA / "tinystories" / "prompts.jsonl"
    if not source.exists():
        pytest.skip(f"the prompts are not at {source}; set REBEL_DATA to the folder that has them")
    (tmp_path / "prompts.jsonl").write_text("".join(source.read_text().splitlines(keepends=True)[:80]))
    return tmp_path / "prompts.jsonl"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(folder: Path, model: PreTrainedModel) -> Path:
    """A model with the tokenizer of whole words and its chat template."""
    model.save_pretrained(folder)
    tiny.tokenizer(chat=True).save_pretrained(folder)
    return folder


# -- without the data folder ---------------------------------------------------------------------------------------


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_settings_of_an_example_are_known_valid_and_as_its_header_says(path: Path) -> None:
    given = read_yaml(path)
    header = path.read_text().partition("\n\n")[0]
    assert f"rebel train examples/{path.name}" in header
    for name in ("model_name_or_path", "dataset_name"):
        assert (name in given) != (f"--{name}" in header.split("For a model")[0].split("As they are")[0])
    validate(resolve({"model_name_or_path": "MODEL", "dataset_name": "DATA"}, given))


def test_no_two_examples_write_to_the_same_folder() -> None:
    folders = [read_yaml(path)["output_dir"] for path in EXAMPLES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("chat", [False, True])
def test_sentiment_prefers_the_cheerful_story(chat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    stories = ["They were happy and loved the wonderful party.", "He cried, for his dog was dead."]
    texts = [[{"role": "assistant", "content": text}] for text in stories] if chat else stories
    rollout = Rollout(Prompt("Once"), tuple(Completion(text, None) for text in texts))
    (scored,) = load_reward("examples/sentiment.py:sentiment")([rollout])
    assert scored.rewards is not None
    cheerful, sad = scored.rewards.tolist()
    assert cheerful > 0.5 and sad < -0.5


def test_the_chat_example_runs_with_a_small_chat_model_and_a_small_reward_model(tmp_path: Path, train: Train) -> None:
    config = LlamaConfig(**{**tiny.GROUPED, "num_labels": 1})
    reward_model = save(tmp_path / "judge", LlamaForSequenceClassification(config))
    rows = [{"prompt": [{"role": "user", "content": f"w{k} w{k + 1}"}]} for k in range(12)]
    metrics = train(
        "chat_reward_model.yaml",
        model_name_or_path=save(tmp_path / "chat", tiny.model()),
        dataset_name=write_rows(tmp_path / "chats.jsonl", rows),
        reward_funcs=reward_model,
        max_prompt_length=32,
    )
    assert [row["iteration"] for row in metrics] == [0, 1, 2]
    assert metrics[-1]["rewards/judge"] != metrics[-2]["rewards/judge"]


def test_the_mathematics_example_runs_with_a_small_model(tmp_path: Path, train: Train) -> None:
    rows = [{"question": f"w{k} w{k + 1}", "answer": f"so w{k} #### {1000 + k}"} for k in range(12)]
    metrics = train(
        "gsm8k.yaml",
        model_name_or_path=save(tmp_path / "solver", tiny.model()),
        dataset_name=write_rows(tmp_path / "questions.jsonl", rows),
        max_prompt_length=32,
    )
    assert metrics[-1]["rewards/exact_match"] == 0  # none of its words is a thousand: every group is flat
    assert metrics[-1]["flat_groups"] == 1
    assert metrics[-1]["samples"] == 2 * 2 * 6 * 4  # and was replaced once, which counts


# -- with the story model ------------------------------------------------------------------------------------------


def test_the_story_example_runs(stories: Path, first_sentences: Path, tmp_path: Path, train: Train) -> None:
    metrics = train("story.yaml", model_name_or_path=stories, dataset_name=first_sentences, max_prompt_length=30)
    assert [row["iteration"] for row in metrics] == [0, 1, 2]
    assert metrics[-1]["eval/kl_initial"] != 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    undocumented = {key for row in metrics for key in row} - documented()
    assert undocumented == {"rewards/sentiment", "eval/rewards/sentiment"}


def test_the_large_batch_example_runs(stories: Path, first_sentences: Path, tmp_path: Path, train: Train) -> None:
    sizes = {"rounds": 2, "round_prompts": 16, "shard_prompts": 8, "prompts_per_iteration": 8, "iterations": "null"}
    metrics = train("large_batch.yaml", model_name_or_path=stories, dataset_name=first_sentences, **sizes)
    assert [row["samples"] for row in metrics] == [0, 32, 64, 96, 128]
    assert len(list((tmp_path / "run" / "rounds").rglob("*.arrow"))) == 2 * 2 * 3
    assert {key for row in metrics for key in row} - documented() == {"rewards/sentiment", "eval/rewards/sentiment"}


def documented() -> set[str]:
    """The keys of metrics.jsonl that docs/report.md explains."""
    rows = [line for line in (ROOT / "docs" / "report.md").read_text().splitlines() if line.startswith("| `")]
    return {word for line in rows for word in line.split("|")[1].replace("`", "").replace(",", " ").split()}


def test_the_story_example_runs_with_the_real_endings_beside_its_own(
    stories: Path, first_sentences: Path, train: Train
) -> None:
    rows = [json.loads(line) for line in first_sentences.read_text().splitlines()]
    endings = [{"prompt": row["prompt"], "ending": " " + row["reference"].split(".")[0] + "."} for row in rows]
    metrics = train(
        "story.yaml",
        model_name_or_path=stories,
        dataset_name=write_rows(first_sentences, endings),
        data_columns="ending",
        data_completions=1,
        max_prompt_length=30,
        max_completion_length=64,
        iterations=1,
    )
    assert metrics[-1]["policy/reward"] != metrics[-1]["data/reward"]
    assert not {key for row in metrics for key in row} - documented() - {"rewards/sentiment", "eval/rewards/sentiment"}


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """Real preferences: 90 pairs of answers that people compared."""
    source = DATA / "qa-feedback" / "pairs.jsonl"
    if not source.exists():
        pytest.skip(f"the pairs are not at {source}; set REBEL_DATA to the folder that has them")
    (tmp_path / "pairs.jsonl").write_text("".join(source.read_text().splitlines(keepends=True)[:90]))
    return tmp_path / "pairs.jsonl"


def test_the_offline_example_runs(stories: Path, compared: Path, tmp_path: Path, train: Train) -> None:
    (tmp_path / "run").mkdir()
    metrics = train(
        "offline.yaml",
        model_name_or_path=stories,
        dataset_name=compared,
        max_completion_length=480,
        prompts_per_iteration=40,
        steps_per_iteration=5,
        iterations="null",
        eval_prompts=20,
    )
    assert metrics[0]["eval/accuracy"] == 0.5 and metrics[0]["eval/r2"] == 0
    assert metrics[-1]["eval/accuracy"] != 0.5
    assert all(0 < row["grad_norm"] < 1e5 for row in metrics[1:])
    assert not {key for row in metrics for key in row} - documented()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_the_lora_example_runs_and_writes_an_adapter(
    stories: Path, first_sentences: Path, tmp_path: Path, train: Train
) -> None:
    metrics = train("lora.yaml", model_name_or_path=stories, dataset_name=first_sentences, lora_r=4, iterations=1)
    assert metrics[-1]["eval/kl_initial"] != 0
    model = AutoModelForCausalLM.from_pretrained(stories)
    assert isinstance(PeftModel.from_pretrained(model, tmp_path / "run"), PeftModel)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_python_example_runs(
    stories: Path, first_sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(RebelConfig, prompts_per_iteration=4, steps_per_iteration=2, num_generations=4, eval_prompts=4)
    monkeypatch.setattr(rebel, "RebelConfig", small, raising=False)
    monkeypatch.syspath_prepend(ROOT / "examples")
    words = [str(stories), str(first_sentences), "--iterations=1", f"--output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["trainer.py", *words])
    runpy.run_path(str(ROOT / "examples" / "trainer.py"), run_name="__main__")
    assert (tmp_path / "run" / "model.safetensors").exists()
