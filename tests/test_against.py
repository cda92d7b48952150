"""Policies compared by a judge: the arithmetic of pairs, `rebel evaluate`, and win rates during a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset

from rebel import RebelConfig, RebelTrainer
from rebel.against import duel, judged, paired, references
from rebel.build.evaluation import DrawnOnce, initial_policy
from rebel.cli import main
from rebel.errors import RebelError, RunStopped
from rebel.evaluators import on_main
from rebel.report import write_report
from rebel.report.versus import lines_of, show, write_page
from rebel.rewards.contest import HigherReward
from rebel.rewards.functions import Notes, PerCompletion
from rebel.rewards.judges import FunctionJudge
from rebel.types import Comparison, Completion, Judge, Prompt, Rollout

JUDGES = '''
def longer(prompts, first, second, **columns):
    """The longer one is better; equal lengths are a tie."""
    sizes = [(len(a.split()), len(b.split())) for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in sizes]

def broken(prompts, first, second, **columns):
    return 1 / 0

def first_place(prompts, first, second, **columns):
    return [0.9] * len(first)

def beyond(prompts, first, second, **columns):
    return [2.0] * len(first)

def silent(prompts, first, second, **columns):
    return [None] * len(first)

def by_row(prompts, first, second, row, **columns):
    """Says of the columns that they have come: the last of the rows are ties."""
    return [0.5 if number > 2 else float(len(a) > len(b)) for number, a, b in zip(row, first, second, strict=True)]

def length(completions, **kwargs):
    return [float(len(text.split())) for text in completions]
'''


@dataclass
class Recorded:
    """A judge that prefers the longer text, and remembers what it was asked."""

    name: str = "recorded"
    asked: list[Comparison] = field(default_factory=list)

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        self.asked += comparisons
        return [float(len(c.first) > len(c.second)) for c in comparisons]


def rollout(text: str, *contents: Any) -> Rollout:
    return Rollout(Prompt(text, {"n": len(contents)}), tuple(Completion(content, None) for content in contents))


# -- pairs and judges ----------------------------------------------------------------------------------------------


def test_every_pair_is_asked_in_both_orders_and_equal_texts_are_not() -> None:
    judge = Recorded()
    pairs = paired([rollout("x", "long one", "same"), rollout("y", "a")], [["short", "same"], ["bb"]])
    found = judged(judge, pairs)
    assert isinstance(judge, Judge)
    assert [(c.first, c.second) for c in judge.asked] == [
        ("long one", "short"),
        ("a", "bb"),
        ("short", "long one"),
        ("bb", "a"),
    ]
    assert [verdict.score for verdict in found] == [1.0, 0.5, 0.0]
    assert [verdict.prompt for verdict in found] == [0, 0, 1]


def test_fewer_of_theirs_begin_again() -> None:
    pairs = paired([rollout("x", "1", "2", "3")], [["a", "b"]])
    assert [(pair.ours, pair.theirs) for pair in pairs] == [("1", "a"), ("2", "b"), ("3", "a")]


def test_lengths_and_scores_are_of_the_answered_pairs() -> None:
    def some(prompts: list[Any], first: list[str], second: list[str], **columns: Any) -> list[float | None]:
        return [None if p == "y" else float(len(a) > len(b)) for p, a, b in zip(prompts, first, second, strict=True)]

    judge = FunctionJudge(some)
    found = duel(judge, paired([rollout("x", "aaaa"), rollout("y", "b" * 90)], [["bb"], ["b"]]), len, seed=0)
    assert (found.result.win_rate, found.result.unanswered) == (1.0, 1)
    assert (found.lengths.ours, found.lengths.theirs) == (4, 2)
    assert found.row(1)["score"] is None and found.row(0)["ours_second"] == 1.0


def test_the_higher_reward_wins_and_no_reward_is_no_answer() -> None:
    def size(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float | None]:
        log_metric("asked", len(completions))
        return [None if text == "?" else float(len(text)) for text in completions]

    notes = Notes()
    judge = HigherReward(PerCompletion(size, notes=notes), "reward:size", notes.aside)
    asked = [("aa", "b"), ("a", "bb"), ("a", "b"), ("a", "?")]
    assert judge([Comparison(Prompt("x"), *pair) for pair in asked]) == [1.0, 0.0, 0.5, None]
    assert notes.take_metrics() == {}, "half of what it saw is the other side's"


def test_references_take_the_form_of_the_prompts_completions() -> None:
    chat = Prompt([{"role": "user", "content": "x"}], {"gold": "y"})
    assert references([Prompt("x", {"gold": "y"}), chat], "gold") == [
        ["y"],
        [[{"role": "assistant", "content": "y"}]],
    ]
    with pytest.raises(RebelError, match="no column 'reference' with references; beside the prompt it has gold"):
        references([chat], "reference")
    with pytest.raises(RebelError, match=r"reference of prompt 0 .* is empty"):
        references([Prompt("x", {"gold": ""})], "gold")


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, another model, prompts with references, and judges."""
    place = tmp_path_factory.mktemp("against")
    (place / "judges.py").write_text(JUDGES)
    rows = [{"prompt": f"w{k} w{k + 1}", "reference": "w1 " * (k % 3 + 20), "row": k} for k in range(16)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("base", 0), ("other", 1)):
        tiny.model(initializer_range=0.1, num_hidden_layers=1, seed=seed).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)
    words = ["--model_name_or_path", place / "base", "--dataset_name", place / "prompts.jsonl", "--eval_prompts", 6]
    words += ["--reward_funcs", f"{place / 'judges.py'}:length", "--output_dir", place / "run", "--iterations", 2]
    words += ["--learning_rate", "3e-2", "--prompts_per_iteration", 6, "--steps_per_iteration", 2]
    words += ["--max_completion_length", 8, "--max_prompt_length", 8, "--num_generations", 4, "--mixture", 2]
    words += ["--use_cpu", "--disable_tqdm", "--eval_against", "initial"]
    words += ["--eval_judge", f"{place / 'judges.py'}:longer"]
    assert main(["train", *map(str, words)]) == 0
    return place


def evaluated(folder: Path, run: str, judge: str, *words: Any) -> dict[str, Any]:
    """The result of `rebel evaluate`, as it is on disk."""
    named = judge.replace("reward:", f"reward:{folder / 'judges.py'}:")
    named = named if judge.startswith("reward:") else f"{folder / 'judges.py'}:{judge}"
    assert main([str(word) for word in ["evaluate", folder / run, "--judge", named, "--use_cpu", *words]]) == 0
    return json.loads((folder / run / "evaluation.json").read_text())


def test_a_run_is_compared_with_the_model_it_began_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(folder, "run", "longer", "--completions", 2, "--reward_funcs", f"{folder / 'judges.py'}:length")
    assert result["ours"].endswith("run (last iterate)") and result["theirs"].endswith("base (a model as it is)")
    assert (result["prompts"], result["pairs"], len(result["rows"])) == (6, 12, 12)
    assert {row["prompt"] for row in result["rows"]} == {f"w{k} w{k + 1}" for k in range(6)}, (
        "those kept out of training"
    )
    scores = [row["score"] for row in result["rows"]]
    assert result["win_rate"] == pytest.approx(sum(scores) / 12)
    sizes = [(len(row["ours"].split()), len(row["theirs"].split())) for row in result["rows"]]
    assert scores == [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in sizes]
    assert result["swap_consistency"] == 1 and result["first_place"] == pytest.approx(0.5)
    assert result["rewards"]["length"] == pytest.approx([sum(side) / 12 for side in zip(*sizes, strict=True)])
    said = capsys.readouterr().out
    assert "win rate" in said and "last iterate" in said and "w0 w1" in said


def test_the_same_seed_gives_the_same_result_and_another_one_another(folder: Path) -> None:
    first, again, other = (evaluated(folder, "run", "longer", "--seed", seed) for seed in (5, 5, 6))
    assert first == again != other
    assert [row["ours"] for row in first["rows"]] != [row["ours"] for row in other["rows"]]


def test_a_policy_against_itself_is_a_tie_whatever_the_judge(folder: Path) -> None:
    result = evaluated(folder, "run", "beyond", "--against", folder / "run")
    assert (result["win_rate"], result["ties"], result["low"], result["high"]) == (0.5, 1.0, 0.5, 0.5)


def test_a_judge_of_places_is_found_out(folder: Path) -> None:
    result = evaluated(folder, "run", "first_place", "--against", folder / "other")
    assert result["win_rate"] == pytest.approx(0.5) and result["swap_consistency"] == 0
    assert result["first_place"] == pytest.approx(0.9)


def test_columns_reach_the_judge_and_a_reward_can_be_one(folder: Path) -> None:
    by_row = evaluated(folder, "run", "by_row", "--against", folder / "other")
    assert [row["score"] for row in by_row["rows"]][3:] == [0.5] * 3
    by_reward = evaluated(folder, "run", "reward:length", "--against", folder / "other")
    by_judge = evaluated(folder, "run", "longer", "--against", folder / "other")
    assert by_reward["rows"] == by_judge["rows"] and by_reward["judge"].startswith("reward:")


def test_against_references_lengths_are_said_to_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(folder, "run", "longer", "--against", "references")
    assert result["win_rate"] == 0 and result["high"] > 0.3  # six losses of six are no proof of more
    assert result["lengths_differ"] and result["length"]["theirs"] == pytest.approx(21)
    assert "lengths differ much" in capsys.readouterr().out


def test_a_plain_model_is_evaluated_with_prompts_of_its_own(folder: Path) -> None:
    words = ["--against", folder / "other", "--dataset_name", folder / "prompts.jsonl", "--eval_prompts", 3]
    result = evaluated(folder, "base", "longer", *words, "--max_completion_length", 6)
    assert (result["prompts"], result["ours"].endswith("(a model as it is)")) == (3, True)


def test_the_mixture_of_a_run_is_evaluated_where_it_is_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, mixed = (evaluated(folder, "run", "longer", *more) for more in ([], ["--mixture"]))
    assert "(mixture of 2 iterates)" in mixed["ours"] and "(last iterate)" in last["ours"]
    assert [row["theirs"] for row in mixed["rows"]] == [row["theirs"] for row in last["rows"]]
    assert [row["ours"] for row in mixed["rows"]] != [row["ours"] for row in last["rows"]]
    words = ["evaluate", folder / "base", "--judge", f"{folder / 'judges.py'}:longer", "--mixture", "--use_cpu"]
    words += ["--dataset_name", folder / "prompts.jsonl", "--against", folder / "other", "--eval_prompts", 3]
    assert main([*map(str, words)]) == 2
    assert "has kept no iterates" in capsys.readouterr().err


def test_a_table_can_be_the_judge(folder: Path, tmp_path: Path) -> None:
    """The judges of training are those of evaluation: here one that knows a single pair of texts."""
    pair = evaluated(folder, "run", "longer", "--against", folder / "other")["rows"][0]
    row = {"prompt": pair["prompt"], "first": pair["ours"], "second": pair["theirs"], "p": 0.75}
    (tmp_path / "table.json").write_text(json.dumps([row]))
    words = ["evaluate", folder / "run", "--judge", tmp_path / "table.json", "--against", folder / "other", "--use_cpu"]
    assert main([*map(str, words)]) == 0
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    assert (result["win_rate"], result["unanswered"]) == (0.75, 5)


def test_a_checkpoint_says_what_it_is(folder: Path) -> None:
    from rebel.versus import which_policy

    place = folder / "run" / "checkpoint-9"
    place.mkdir(exist_ok=True)
    assert which_policy(str(place)) == "last iterate at checkpoint 9"
    place.rmdir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--judge", "JUDGES:beyond", "--against", "OTHER"], "returned 2"),
        (["RUN", "--judge", "JUDGES:silent", "--against", "OTHER"], "answered none of the 6 pairs"),
        (["RUN", "--judge", "JUDGES:absent"], "there is no 'absent' in it"),
        (["RUN"], "--judge"),
        (["RUN", "--judge", "JUDGES:longer", "--agains", "x"], "did you mean --against?"),
        (["RUN", "--judge", "JUDGES:longer", "--eval_prompts", "9"], "kept 6 prompts out of training"),
        (["RUN", "--judge", "JUDGES:longer", "--completions", "0"], "--completions 0: use 1 or more"),
        (["RUN", "--judge", "JUDGES:longer", "--against", "/nowhere/model"], "there is no such folder"),
        (
            ["RUN", "--judge", "JUDGES:longer", "--against", "references", "--reference_column", "gold"],
            "no column 'gold'",
        ),
        (["OTHER", "--judge", "JUDGES:longer"], "give --dataset_name"),
        (
            ["EMPTY", "--judge", "JUDGES:longer", "--dataset_name", "PROMPTS", "--against", "OTHER"],
            "has no model in it",
        ),
        (["RUN", "--judge", "JUDGES:longer", "--eval_temperature", "-1"], "--eval_temperature -1"),
    ],
)
def test_what_is_wrong_is_one_error(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    names = {"RUN": "run", "OTHER": "other", "EMPTY": "empty", "PROMPTS": "prompts.jsonl", "JUDGES": "judges.py"}
    argv = [re.sub("|".join(names), lambda found: str(folder / names[found[0]]), word) for word in words]
    assert main(["evaluate", *argv, "--use_cpu"]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_judge_that_raises_ends_it_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", folder / "run", "--judge", f"{folder / 'judges.py'}:broken", "--against", folder / "other"]
    assert main([*map(str, words), "--use_cpu"]) == 1
    said = capsys.readouterr().err
    assert "judge broken raised ZeroDivisionError" in said and "Traceback" not in said


def test_the_page_escapes_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>\u202e[bold red]"
    found = duel(Recorded(), paired([rollout(evil, evil)], [["b"]]), len, seed=0)
    result = {"ours": evil, "theirs": evil, "judge": evil, **found.summary(), "rows": found.rows()}
    page = write_page(result, tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert "default-src 'none'" in page and "http" not in re.sub(r"http-equiv", "", page)
    show(result, examples=1)
    assert "[bold red]" in capsys.readouterr().out
    assert any("interval" in line or "95%" in line for line in lines_of(result))


# -- during a run --------------------------------------------------------------------------------------------------


def test_a_run_reports_its_win_rate_against_where_it_began(folder: Path) -> None:
    """The reward is the length and the judge prefers the longer one: what is learnt shows as wins."""
    first, *_, last = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (first["eval/win_rate"], first["eval/win_ties"], first["eval/swap_consistency"]) == (0.5, 1.0, 1.0)
    assert last["eval/win_rate"] >= 0.5 and last["eval/win_ties"] < 1
    assert last["eval/win_rate_low"] <= last["eval/win_rate"] <= last["eval/win_rate_high"]
    kept = [json.loads(line) for line in (folder / "run" / "eval_opponents.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [f"w{k} w{k + 1}" for k in range(6)]
    assert "Win rate" in write_report(folder / "run").read_text()


def test_the_last_evaluation_of_a_run_is_that_of_rebel_evaluate_on_its_folder(folder: Path) -> None:
    """Two ways to the same number: the win rate of the run's end, and the saved model against the initial one."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [row["completion"] for row in map(json.loads, (folder / "run" / "samples.jsonl").read_text().splitlines())]
    theirs = [json.loads(line) for line in (folder / "run" / "eval_opponents.jsonl").read_text().splitlines()]
    scores = []
    for mine, other in zip(ours[-6:], theirs, strict=True):
        a, b = len(mine.split()), len(other["completions"][0].split())
        scores.append(0.5 + 0.5 * ((a > b) - (a < b)))
    assert rows[-1]["eval/win_rate"] == pytest.approx(sum(scores) / 6)


@pytest.mark.parametrize("side", ["references", "other"])
def test_the_trainer_of_python_reports_win_rates_too(side: str, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    values = {**tiny.SETTINGS, "output_dir": str(tmp_path / "run"), "iterations": 1}
    values |= {"eval_against": side if side == "references" else str(folder / side), "kl_per_iteration": None}
    trainer = RebelTrainer(
        model=tiny.small(),
        reward_funcs=tiny.evenness,
        args=RebelConfig(**values, eval_judge=f"{folder / 'judges.py'}:longer"),
        train_dataset=Dataset.from_list(rows[4:]),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tiny.tokenizer(),
    )
    before = trainer.evaluate()
    trainer.train()
    assert ("eval_win_rate" in before) and (tmp_path / "run" / "eval_opponents.jsonl").exists() == (side == "other")
    logged = [row for row in trainer.state.log_history if "eval_win_rate" in row]
    assert len(logged) == 2 and logged[0]["eval_win_rate"] == before["eval_win_rate"]


def test_opponents_are_drawn_once_and_survive_a_resumed_run(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw(learner: Any, ours: Sequence[Rollout], seed: int) -> list[list[Any]]:
        drawn.append(seed)
        return [[f"other {seed}"] for _ in ours]

    ours = [rollout("x", "a"), rollout("y", "b")]
    new, later = (tiny.job(tmp_path / "run").recorder.learner for _ in range(2))
    later.steps = 5
    made = DrawnOnce(draw, tmp_path / "o.jsonl", "base")
    assert made(new, ours, 1) == made(later, ours, 2) == [["other 1"], ["other 1"]]
    resumed = DrawnOnce(draw, tmp_path / "o.jsonl", "base")
    assert resumed(later, ours, 3) == [["other 1"], ["other 1"]] and drawn == [1]
    again = DrawnOnce(draw, tmp_path / "o.jsonl", "base")
    assert again(new, ours, 4) == [["other 4"], ["other 4"]], "a new run does not take a former run's"
    elsewhere = DrawnOnce(draw, tmp_path / "o.jsonl", "another side")
    assert elsewhere(later, ours, 5) == [["other 5"], ["other 5"]]
    with pytest.raises(RunStopped, match=r"eval_opponents\.jsonl"):
        initial_policy(later, ours, 6)


def test_a_judge_that_fails_on_the_main_process_fails_there(tmp_path: Path) -> None:
    learner = tiny.job(tmp_path).recorder.learner

    def fail() -> None:
        raise RunStopped("the judge is gone")

    with pytest.raises(RunStopped, match="the judge is gone"):
        on_main(learner, fail)
    assert on_main(learner, lambda: 3) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval_against", "initial"], "give --eval_judge"),
        (["--eval_judge", "x.py:f"], "give --eval_against"),
        (["--eval_against", "initial", "--eval_judge", "x.py:f", "--eval_prompts", "0"], "use some --eval_prompts"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model_name_or_path", "m", "--dataset_name", "d", "--reward_funcs", "exact_match", "--iterations", "1"]
    assert main(["train", *given, *words]) == 2
    assert said in capsys.readouterr().err
