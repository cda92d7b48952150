"""SFT and reward models as stages: what TRL trains is what the rest of the package reads; wrong input is said first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tiny
import torch
import trl.trainer.base_trainer as trl_base
import yaml
from conftest import DATA
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rebel.cli import main
from rebel.errors import RebelError
from rebel.rewards.models import RewardModel
from rebel.stages.data import demonstrations, load_stage, preferences
from rebel.stages.settings import REWARD_MODEL, SFT, PreferenceData, SftData, help_of, read_words
from rebel.stages.trainers import parsed, trainer_of, without_telemetry
from rebel.types import Completion, Prompt, Rollout

ROOT = Path(__file__).resolve().parents[1]
FAST = ["--use_cpu", "true", "--max_steps", "2", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]
FAST += ["--report_to", "none", "--gradient_checkpointing", "false", "--logging_steps", "1", "--max_length", "48"]


def words_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lm(folder: Path, chat: bool = False) -> Path:
    """A random language model with its tokenizer."""
    tiny.small().save_pretrained(folder)
    tiny.tokenizer(chat).save_pretrained(folder)
    return folder


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(chat: bool) -> list[dict[str, Any]]:
    """Even words are better than odd ones."""
    rows = [{"prompt": f"w{k} w{k + 1}", "chosen": f" w{2 * k} w4", "rejected": f" w{2 * k + 1} w5"} for k in range(8)]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{name: message(roles[name], text.strip()) for name, text in row.items()} for row in rows] if chat else rows


# -- the commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"text": "w1 w2 w3"},
        {"prompt": "w1", "completion": " w2 w3"},
        {"messages": message("user", "w1") + message("assistant", "w2")},
        {"question": "w1", "reply": " w2"},
    ],
    ids=lambda row: "-".join(row),
)
def test_sft_trains_on_every_form_of_rows_and_its_folder_is_a_model(row: dict[str, Any], tmp_path: Path) -> None:
    model = lm(tmp_path / "model", chat="messages" in row)
    data = words_file(tmp_path / "rows.jsonl", [row] * 8)
    named = ["--prompt_column", "question", "--completion_column", "reply"] if "question" in row else []
    words = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["sft", *words, *named, *FAST, "--learning_rate=1e-2"]) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (model, tmp_path / "out"))
    changes = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(changes)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2").input_ids == tiny.tokenizer()("w1 w2").input_ids
    assert yaml.safe_load((tmp_path / "out" / "sft.yaml").read_text())["max_steps"] == "2"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_reads_texts_as_it_was_trained_to(chat: bool, adapter: bool, tmp_path: Path) -> None:
    """The ids that it scores are those that TRL trained on, and so are its scores."""
    model, rows = lm(tmp_path / "model", chat), pairs(chat)
    given = {
        "model_name_or_path": str(model),
        "dataset_name": str(words_file(tmp_path / "pairs.jsonl", rows)),
        "output_dir": str(tmp_path / "out"),
        **({"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"} if adapter else {}),
    }
    (tmp_path / "rm.yaml").write_text(yaml.safe_dump(given))
    assert main(["reward-model", str(tmp_path / "rm.yaml"), *FAST, "--learning_rate", "1e-2"]) == 0
    reward = RewardModel(tmp_path / "out", device="cpu")
    settings = parsed(REWARD_MODEL, {**given, "output_dir": str(tmp_path / "again"), "use_cpu": True})
    data = load_stage(settings.data, "text")
    trainer = trainer_of(settings, data, AutoTokenizer.from_pretrained(model))
    for row, trained in zip(rows, trainer.train_dataset, strict=True):
        for name in ("chosen", "rejected"):
            ids = reward.ids(Prompt(row["prompt"]), Completion(row[name], None))
            assert ids == trained[f"{name}_ids"]
            assert chat or ids[-1] == tiny.EOS
    rollout = Rollout(
        Prompt(rows[0]["prompt"]), (Completion(rows[0]["chosen"], None), Completion(rows[0]["rejected"], None))
    )
    (scored,) = reward([rollout])
    assert scored.rewards is not None and scored.rewards.isfinite().all()
    assert scored.rewards[0] != scored.rewards[1]


def test_a_reward_model_learns_which_side_is_better(tmp_path: Path) -> None:
    """From columns a and b with votes, where a is better in every other row: chosen and rejected are not mixed up."""
    rows = []
    for k in range(40):
        even, odd = f" w{2 * (k % 10)} w4", f" w{2 * (k % 10) + 1} w5"
        a_wins = k % 2 == 0
        rows.append(
            {"prompt": f"w{k % 7}", "a": even if a_wins else odd, "b": odd if a_wins else even, "votes": float(a_wins)}
        )
    words = ["--model_name_or_path", str(lm(tmp_path / "model")), "--output_dir", str(tmp_path / "out")]
    words += ["--dataset_name", str(words_file(tmp_path / "v.jsonl", rows)), "--pair_columns", "a", "b"]
    words += ["--preference_column", "votes", *FAST, "--max_steps", "60", "--learning_rate", "1e-2"]
    assert main(["reward-model", *words]) == 0
    sides = (Completion(" w6 w4", None), Completion(" w7 w5", None))
    (scored,) = RewardModel(tmp_path / "out", device="cpu")([Rollout(Prompt("w3"), sides)])
    assert scored.rewards is not None
    assert scored.rewards[0] > scored.rewards[1] + 1


def test_help_answers_without_torch() -> None:
    blocked = "import sys\nfor name in ('torch', 'transformers', 'trl', 'datasets'): sys.modules[name] = None\n"
    code = blocked + "from rebel.cli import main\nmain(sys.argv[1:])"
    for stage in (SFT, REWARD_MODEL):
        done = subprocess.run([sys.executable, "-c", code, stage.name, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert stage.config in done.stdout and "--model_name_or_path" in done.stdout
        assert help_of(stage).splitlines()[0] in done.stdout


# -- telemetry -----------------------------------------------------------------------------------------------------


def test_nothing_is_sent_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own call is made, and stops where the library looks at HF_HUB_DISABLE_TELEMETRY."""
    import huggingface_hub.utils._telemetry as telemetry

    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(telemetry._TELEMETRY_QUEUE, "put", sent.append)
    data = Dataset.from_list([{"text": "w1 w2"}] * 4)
    given = {"model_name_or_path": str(lm(tmp_path / "m")), "dataset_name": "d", "output_dir": str(tmp_path / "o")}
    settings = parsed(SFT, {**given, "use_cpu": True})

    def construct() -> None:
        from rebel.stages.data import Rows

        trainer_of(settings, Rows(data, None, Counter()), tiny.tokenizer())

    construct()
    assert sent == []
    assert not huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, "the setting of the process is left as it was"
    monkeypatch.setattr("rebel.stages.trainers.without_telemetry", pytest.importorskip("contextlib").nullcontext)
    settings.training.model_init_kwargs = None
    construct()
    assert len(sent) == 1, "without it, there would have been a ping: the test can fail"
    with without_telemetry():
        trl_base.send_telemetry("x")
    assert len(sent) == 1


# -- wrong settings ------------------------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What a command says that is wrong; a code of 2, and no traceback."""
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning_rte", "1e-4"], "did you mean --learning_rate?"),
        (["--pair_colums", "a", "b"], "did you mean --pair_columns?"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--eval_strategy", "epoch"], "without rows to evaluate on"),
        (["--load_in_4bit", "true"], "leave an adapter"),
        (["--lr_scheduler_type", "constantly"], "constantly"),
        (["--max_length", "1000"], "the model has 64 positions"),
        (["--chat_template_path", "nowhere", "--model_name_or_path", "/nowhere/model"], "there is no such folder"),
        (["--dataset_name", "nowhere.jsonl"], "there is no such file"),
        (["--eval_rows", "8"], "--eval_rows 8 of 8 rows"),
        (["stray"], "cannot be read"),
    ],
)
def test_a_wrong_setting_is_one_error(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = words_file(tmp_path / "pairs.jsonl", pairs(False))
    given = ["--model_name_or_path", lm(tmp_path / "model"), "--dataset_name", data, "--output_dir", tmp_path / "out"]
    argv = [*words, *given] if words == ["stray"] else [*given, "--use_cpu", *words]
    assert said in complaint(capsys, "reward-model", *argv)
    assert not (tmp_path / "out").exists(), "nothing is written before all is known to be right"


def test_every_wrong_name_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "sft", "--max_lenght", "3", "--optimm", "x")
    assert "--max_length?" in said and "--optim?" in said


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(capsys, "sft", "--use_cpu")
    assert "no model" in said and "no data" in said


def test_a_folder_with_another_run_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = lm(tmp_path / "model"), words_file(tmp_path / "t.jsonl", [{"text": "w1 w2"}] * 4)
    words = ["sft", "--model_name_or_path", model, "--dataset_name", data, *FAST, "--max_steps", "1", "--output_dir"]
    assert main([*map(str, words), str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "holds another run" in complaint(capsys, *words, tmp_path / "out")
    assert "the model's own folder" in complaint(capsys, *words, model)
    other = lm(tmp_path / "other")
    assert "was not made by rebel sft" in complaint(capsys, *words, other, "--overwrite_output_dir")
    assert main([*map(str, words), str(tmp_path / "out"), "--overwrite_output_dir"]) == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_words_and_files_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("learning-rate: 1e-4\nmax_length: null\n")
    read = read_words([str(tmp_path / "c.yaml"), "--max-steps=3", "--pair_columns", "a", "b", "--packing", "--x", "-1"])
    assert read == {
        "learning_rate": "1e-4",
        "max_length": None,
        "max_steps": "3",
        "pair_columns": ["a", "b"],
        "packing": True,
        "x": "-1",
    }


def test_a_none_in_the_file_reaches_trl(tmp_path: Path) -> None:
    given = {"model_name_or_path": "m", "dataset_name": "d", "max_length": None, "use_cpu": True}
    assert parsed(SFT, given).training.max_length is None
    assert parsed(SFT, {**given, "learning_rate": "3e-5"}).training.learning_rate == 3e-5


# -- rows ----------------------------------------------------------------------------------------------------------


def preferred(rows: list[dict[str, Any]], **settings: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
    left_out: Counter[str] = Counter()
    data = PreferenceData(dataset_name="d", **settings)
    return list(preferences(Dataset.from_list(rows), data, left_out)), left_out


def test_votes_become_chosen_and_rejected_and_what_has_no_winner_is_counted() -> None:
    rows = [
        {"prompt": "x", "a": "1", "b": "2", "p": 0.9, "margin": -3.0},
        {"prompt": "x", "a": "1", "b": "2", "p": 0.0, "margin": 0.0},
        {"prompt": "x", "a": "1", "b": "2", "p": 0.5, "margin": 0.0},
        {"prompt": "x", "a": "1", "b": "1", "p": 1.0, "margin": 0.0},
        {"prompt": "x", "a": "1", "b": " ", "p": 1.0, "margin": 0.0},
        {"prompt": "x", "a": None, "b": "2", "p": 1.0, "margin": 0.0},
    ]
    kept, left_out = preferred(rows, pair_columns=["a", "b"], preference_column="p")
    assert kept == [
        {"prompt": "x", "chosen": "1", "rejected": "2"},  # the margin of the votes is not TRL's
        {"prompt": "x", "chosen": "2", "rejected": "1"},
    ]
    assert sum(left_out.values()) == 4 and left_out["without a winner"] == 1
    assert left_out["with a equal to b"] == 1


def test_margins_need_their_tie_and_probabilities_theirs() -> None:
    rows = [{"chosen": "1", "rejected": "2", "p": p} for p in (-1.0, 2.0)]
    with pytest.raises(RebelError, match="no probability"):
        preferred(rows, preference_column="p")
    kept, _ = preferred(rows, preference_column="p", preference_tie=0.0)
    assert [row["chosen"] for row in kept] == ["2", "1"]
    with pytest.raises(RebelError, match="never below"):
        preferred([{**row, "p": abs(row["p"])} for row in rows], preference_column="p", preference_tie=0.0)
    with pytest.raises(RebelError, match="row 0: p is nan"):
        preferred([{**rows[0], "p": float("nan")}], preference_column="p")


def test_trls_margin_stays_and_must_not_be_a_sign() -> None:
    kept, _ = preferred([{"chosen": "1", "rejected": "2", "margin": 0.5}])
    assert kept == [{"chosen": "1", "rejected": "2", "margin": 0.5}]
    with pytest.raises(RebelError, match="--preference_column margin --preference_tie 0"):
        preferred([{"chosen": "1", "rejected": "2", "margin": -0.5}])


def test_missing_columns_and_mixed_kinds_are_errors() -> None:
    with pytest.raises(RebelError, match="no column chosen, rejected; it has a, b"):
        preferred([{"a": "1", "b": "2"}])
    with pytest.raises(RebelError, match="no column question"):
        preferred([{"chosen": "1", "rejected": "2"}], prompt_column="question")
    with pytest.raises(RebelError, match="give two columns"):
        preferred([{"a": "1"}], pair_columns=["a"])
    with pytest.raises(RebelError, match="prompt is text"):
        preferred([{"prompt": "x", "chosen": message("assistant", "1"), "rejected": message("assistant", "2")}])
    with pytest.raises(RebelError, match="none of the columns prompt with completion, messages, or text"):
        list(demonstrations(Dataset.from_list([{"a": "1"}]), SftData(dataset_name="d"), "text", Counter()))


def test_a_set_of_which_nothing_is_left_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = words_file(tmp_path / "ties.jsonl", [{"a": "1", "b": "2", "p": 0.5}] * 3)
    words = ["--pair_columns", "a", "b", "--preference_column", "p", "--use_cpu"]
    said = complaint(capsys, "reward-model", "--model_name_or_path", "m", "--dataset_name", data, *words)
    assert "none of its 3 rows can be used: 3 without a winner" in said


def test_chats_need_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = words_file(tmp_path / "chats.jsonl", pairs(True))
    words = ["--model_name_or_path", lm(tmp_path / "model"), "--dataset_name", data, "--use_cpu"]
    assert "no chat template" in complaint(capsys, "reward-model", *words)


# -- the pipeline --------------------------------------------------------------------------------------------------


def test_the_three_files_run_after_one_another(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SFT, reward model and REBEL on real data, each a few steps, by the example files and flags for the data."""
    named = {name: DATA / path for name, path in PIPELINE_DATA.items()}
    if not all(path.exists() for path in named.values()):
        pytest.skip(f"the data of the pipeline are not below {DATA}")
    monkeypatch.chdir(tmp_path)
    few = ["--use_cpu", "--disable_tqdm"]
    for name, path in named.items():
        lines = path.read_text().splitlines(keepends=True)[:80]
        Path(f"{name}.jsonl").write_text("".join(lines))
    files = ROOT / "examples" / "pipeline"
    small = "--iterations 1 --eval_prompts 4 --prompts_per_iteration 4 --num_generations 4 --steps_per_iteration 2"
    steps = [
        ["sft", files / "sft.yaml", "--model_name_or_path", stories, "--dataset_name", "sft.jsonl", "--max_steps=3"],
        [
            "reward-model",
            files / "reward_model.yaml",
            "--dataset_name",
            "pairs.jsonl",
            "--max_steps=3",
            "--eval_rows=8",
        ],
        ["train", files / "rebel.yaml", "--dataset_name", "prompts.jsonl", *small.split()],
    ]
    for step in steps:
        assert main([str(word) for word in [*step, *few]]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in Path("pipeline/rebel/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["failed_rewards"] == 0 and rows[-1]["rewards/reward-model"] != 0
    AutoModelForCausalLM.from_pretrained("pipeline/rebel")


PIPELINE_DATA = {
    "sft": "tinystories/train.jsonl",
    "pairs": "pandalm/pandalm_human.jsonl",
    "prompts": "tinystories/prompts.jsonl",
}


def test_the_examples_say_how_they_are_run() -> None:
    for path, command in {"sft.yaml": "sft", "reward_model.yaml": "reward-model", "rebel.yaml": "train"}.items():
        text = (ROOT / "examples" / "pipeline" / path).read_text()
        assert f"rebel {command} examples/pipeline/{path}" in text
    assert os.sep not in yaml.safe_load(text)["reward_funcs"][0].removeprefix("pipeline/")
