"""The task that needs no download: its problems, its careless teacher, and what REBEL makes of its model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rebel.cli import main
from rebel.errors import RebelError
from rebel.report import read_rows
from rebel.tasks import arithmetic
from rebel.tasks.arithmetic import Sum, exact, problems, quickstart, worked_examples
from rebel.tasks.pretrain import character_tokenizer, greedy_accuracy, lessons


def test_a_careless_answer_is_wrong_where_there_is_a_carry_and_nowhere_else() -> None:
    assert (Sum(47, 38).prompt, Sum(47, 38).answer, Sum(47, 38).careless_answer) == ("47+38=", "85", "75")
    assert Sum(41, 38).careless_answer == Sum(41, 38).answer == "79"
    every = problems(0).training
    assert all((s.careless_answer != s.answer) == (s.a % 10 + s.b % 10 > 9) for s in every)


def test_no_held_out_problem_is_ever_trained_on() -> None:
    parts = problems(3)
    assert len(parts.training) == 7100 and len(parts.held_out) == 1000
    assert not set(parts.training) & set(parts.held_out)
    assert problems(3) == parts != problems(4)
    taught = {prompt for prompt, _ in worked_examples(parts.training, 50_000, 3)}
    assert not taught & {s.prompt for s in parts.held_out}


def test_the_teacher_draws_its_mistakes_anew() -> None:
    """Else a model large enough would remember which problems it saw done wrong."""
    told: dict[str, Counter[str]] = {}
    for prompt, answer in worked_examples([Sum(47, 38), Sum(41, 38)], 4000, 1):
        told.setdefault(prompt, Counter())[answer] += 1
    assert set(told["41+38="]) == {"79"}
    assert told["47+38="]["75"] / told["47+38="].total() == pytest.approx(arithmetic.FORGOTTEN, abs=0.04)


def test_the_verifier_wants_the_answer_to_the_letter() -> None:
    assert exact(["85", "085", "85=", ""], answer=["85"] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_lessons_teach_the_answer_and_its_end() -> None:
    tokenizer = character_tokenizer(arithmetic.ALPHABET)
    course = lessons(tokenizer, [("1+2=", "3"), ("55+66=", "121")])
    taught = [[t for t in row if t >= 0] for row in course.targets.tolist()]
    end = tokenizer.eos_token_id
    assert taught == [[*tokenizer("3").input_ids, end], [*tokenizer("121").input_ids, end]]
    for ids, targets in zip(course.ids.tolist(), course.targets.tolist(), strict=True):
        assert all(target in (-100, ids[place + 1]) for place, target in enumerate(targets[:-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real thing with a sixth of its iterations."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    quickstart(str(folder), seed=42, iterations=10)
    return folder


def test_rebel_improves_the_model_on_problems_it_never_saw(folder: Path) -> None:
    first, *_, last = read_rows(folder / "metrics.jsonl")
    assert first["eval/reward"] <= 0.6
    assert last["eval/reward"] >= 0.85
    files = {part: (folder / "problems" / f"{part}.jsonl").read_text().splitlines() for part in ("train", "test")}
    assert not set(files["train"]) & set(files["test"]) and len(files["test"]) == 1000
    assert "<svg" in (folder / "report.html").read_text()


def test_its_model_answers_and_is_the_one_that_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    exam = lessons(tokenizer, [(s.prompt, s.answer) for s in problems(42).held_out])
    last = read_rows(folder / "metrics.jsonl")[-1]
    assert greedy_accuracy(model, exam) == pytest.approx(last["eval/reward"], abs=0.002)
    solved = next(
        s for s in problems(42).held_out if greedy_accuracy(model, lessons(tokenizer, [(s.prompt, s.answer)]))
    )
    assert main(["sample", str(folder), "--prompt", solved.prompt, "--temperature", "0"]) == 0
    assert f"] {solved.answer}\n" in capsys.readouterr().out


def test_a_folder_with_a_run_is_not_written_over(folder: Path) -> None:
    with pytest.raises(RebelError, match="holds another run: delete it, or name another folder"):
        quickstart(str(folder), seed=42)
