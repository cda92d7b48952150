"""A run from first to last: resumed as if never interrupted, stopped with nothing lost, and learning."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rebel import checkpoint, fit, job
from rebel.build.job import Job
from rebel.cli import main
from rebel.errors import RebelError, RunStopped
from rebel.evaluate import length
from rebel.job import carry_out
from rebel.learner import Learner
from rebel.policies.causal_lm import causal_lm
from rebel.record import FREE, due
from rebel.report import read_rows
from rebel.run_folder import checkpoint_to_resume, claim_folder
from rebel.samplers.generate import Generate
from rebel.stepsize import REACH, AutoEta

EVERYTHING: dict[str, Any] = {
    "eta": "auto",
    "beta": 0.02,
    "average": 0.6,
    "num_iterations": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2.0,
    "replace_flat_groups": 1.0,
    "load_best_model_at_end": True,
    "eval_steps": 6,
    "save_steps": 6,
}


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    """Its page is tested elsewhere, and takes a fifth of the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "write_report", lambda folder: folder)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run that nobody interrupted."""
    seeded(0)
    return tiny.trained(tmp_path_factory.mktemp("whole"), reward=noisy)


def seeded(number: int) -> None:
    numpy.random.seed(number)
    torch.manual_seed(number)


def noisy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward with random numbers of numpy and torch in it, whose state has to be resumed too.

    Those of Python are left out: the type checks of the tests take some of them.
    """
    values = tiny.evenness(completion_ids)
    return [value + 0.1 * numpy.random.rand() + 0.1 * float(torch.rand(())) for value in values]


def assert_same(one: Job, other: Job) -> None:
    """Bit for bit: weights, average, optimiser, rows, samples and the result."""
    mine, others = one.recorder, other.recorder
    pairs = zip(mine.learner.weights, others.learner.weights, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(mine.learner.averaged, others.learner.averaged, strict=True))
    assert tiny.rows(mine.folder) == tiny.rows(others.folder)
    assert read_rows(mine.folder / "samples.jsonl") == read_rows(others.folder / "samples.jsonl")
    (result,) = {p.name for p in mine.folder.glob("*.safetensors")}
    assert (mine.folder / result).read_bytes() == (others.folder / result).read_bytes()


class StopAt(TrainerCallback):
    """Ends the run at this optimiser step: by a signal, as callbacks do, or by a crash."""

    def __init__(self, step: int, how: str = "SIGTERM") -> None:
        self.step, self.how = step, how

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.how == "callback":
                control.should_training_stop = True
            elif self.how != "crash":
                os.kill(os.getpid(), getattr(signal, self.how))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.step == 0:  # before the first iteration
            self.on_step_end(args, state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.how == "crash":
            raise MemoryError


@pytest.fixture
def kill_at_chunk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends SIGTERM while that chunk of prompts is drawn from, counted from the first one of the run."""

    def arm(number: int) -> None:
        drawn, count = Generate.__call__, [0]

        def killing(self: Generate, *args: Any) -> Iterator:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return drawn(self, *args)

        monkeypatch.setattr(Generate, "__call__", killing)

    return arm


# -- interrupted and resumed = never interrupted ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_stopped_after_an_iteration_and_resumed(whole: Job, tmp_path: Path, how: str) -> None:
    seeded(0)
    with pytest.raises(RunStopped, match=rf"{how} after iteration 1\. .*checkpoint-3 is complete; go on with: "):
        tiny.trained(tmp_path, reward=noisy, callbacks=[StopAt(3, how)])
    assert [row["iteration"] for row in tiny.rows(tmp_path)] == [0, 1]
    seeded(99)
    assert_same(tiny.trained(tmp_path, resume=True, reward=noisy), whole)


def test_crashed_beyond_its_checkpoint_and_resumed(whole: Job, tmp_path: Path) -> None:
    """What was reported after the checkpoint is cut off, and reported again."""
    seeded(0)
    with pytest.raises(MemoryError):
        tiny.trained(tmp_path, reward=noisy, save_steps=6, callbacks=[StopAt(9, "crash")])
    assert [row["iteration"] for row in tiny.rows(tmp_path)] == [0, 1, 2, 3]
    assert checkpoint.all_checkpoints(tmp_path)[-1].name == "checkpoint-6"
    seeded(99)
    assert_same(tiny.trained(tmp_path, resume=True, reward=noisy), whole)


def test_a_finished_run_goes_on_beyond_its_end(whole: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeded(0)
    tiny.trained(tmp_path, reward=noisy, iterations=2, save_steps=100)
    assert [found.name for found in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-6"]
    tiny.trained(tmp_path, resume=True, reward=noisy, iterations=2)
    assert "2 of 2 iterations are done; to go on, ask for more" in capsys.readouterr().out
    seeded(99)
    assert_same(tiny.trained(tmp_path, resume=True, reward=noisy), whole)
    assert not checkpoint.all_checkpoints(tiny.trained(tmp_path / "none", save_strategy="no").recorder.folder), (
        "not if none are wanted"
    )


@pytest.mark.parametrize("settings", [{}, {"save_strategy": "no", "tokens_per_micro_batch": 128}])
def test_stopped_in_the_middle_of_sampling_and_resumed(
    whole: Job, tmp_path: Path, kill_at_chunk: Callable, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations are one chunk and iterations three, so that chunk 7 is in the middle of the second iteration."""
    seeded(0)
    kill_at_chunk(7)
    with pytest.raises(RunStopped, match="SIGTERM after iteration 1"):
        tiny.trained(tmp_path, reward=noisy, **settings)
    monkeypatch.undo()
    seeded(99)
    assert_same(tiny.trained(tmp_path, resume=True, reward=noisy, **settings), whole)


def test_stopped_before_anything_was_learnt_and_resumed(whole: Job, tmp_path: Path, kill_at_chunk: Callable) -> None:
    seeded(0)
    kill_at_chunk(3)
    with pytest.raises(RunStopped, match="SIGTERM after iteration 0"):
        tiny.trained(tmp_path, reward=noisy)
    assert checkpoint.all_checkpoints(tmp_path)[-1].name == "checkpoint-0"
    resumed = tiny.trained(tmp_path, resume=True, reward=tiny.evenness)
    assert [row["iteration"] for row in tiny.rows(tmp_path)] == [0, 1, 2, 3]
    assert resumed.recorder.learner.steps == 9


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_with_everything_switched_on(tmp_path: Path, lora: bool) -> None:
    """Step sizes, averages, schedules, the best model and the reference go on where they were."""

    def sometimes_flat(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[float]:
        values = noisy(completion_ids)
        return [0.0 if number % 3 == 0 else value for value, number in zip(values, row, strict=True)]

    settings = EVERYTHING | ({"reference": "base"} if lora else {})

    def run(folder: Path, resume: bool = False, **more: Any) -> Job:
        start = tiny.small()
        if lora:
            torch.manual_seed(1)
            start = get_peft_model(start, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        if not resume:
            seeded(0)
        return tiny.trained(folder, resume=resume, lm=start, reward=sometimes_flat, **settings, **more)

    whole = run(tmp_path / "whole")
    with pytest.raises(RunStopped):
        run(tmp_path / "parts", callbacks=[StopAt(6)])
    seeded(99)
    assert_same(run(tmp_path / "parts", resume=True), whole)
    assert {row["eta"] for row in tiny.rows(tmp_path / "whole")[1:]} != {2.0}


def test_a_run_on_a_real_model_killed_while_sampling_and_resumed(stories: Path, tmp_path: Path) -> None:
    """`rebel train` in a process of its own gets SIGTERM; `rebel train --resume` gives what nothing had stopped."""
    torch.set_num_threads(1)
    rows = [{"prompt": text} for text in ("Once upon a time", "The dog", "Lily said", "A red ball", "One day", "Tom")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text("def score(completions, **_): return [c.count('a') / 9 for c in completions]")

    def flags(run: str, *more: str) -> list[str]:
        given = {
            **{"model_name_or_path": stories, "dataset_name": tmp_path / "prompts.jsonl", "eval_prompts": 1},
            **{"reward_funcs": f"{tmp_path / 'reward.py'}:score", "output_dir": tmp_path / run, "iterations": 2},
            **{"prompts_per_iteration": 5, "num_generations": 4, "sampling_batch": 4, "steps_per_iteration": 2},
            **{"max_completion_length": 24, "learning_rate": 1e-3, "eta": 10, "save_steps": 2, "eval_steps": 2},
        }
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return ["train", *words, "--use_cpu", "--disable_tqdm", *more]

    assert main(flags("whole")) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "rebel", *flags("parts")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    try:
        metrics = tmp_path / "parts" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.01)  # until the first evaluation is written: next comes the sampling of iteration 1
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert "rebel: stopped: SIGTERM after iteration" in errors and "--resume" in errors
    assert "Traceback" not in errors
    assert len(tiny.rows(tmp_path / "parts")) < 3 and not (tmp_path / "parts" / "model.safetensors").exists()
    assert main(["train", str(tmp_path / "parts" / "config.yaml"), "--resume"]) == 0
    assert tiny.rows(tmp_path / "parts") == tiny.rows(tmp_path / "whole")
    results = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert results[0] == results[1]


def test_a_callback_may_end_the_run_which_then_has_its_result(tmp_path: Path) -> None:
    made = tiny.trained(tmp_path, callbacks=[StopAt(6, "callback")])
    assert [row["iteration"] for row in tiny.rows(tmp_path)] == [0, 1, 2]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), tiny.weights(made), strict=True))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_configuration_is_refused_by_name(whole: Job, tmp_path: Path) -> None:
    latest = checkpoint.all_checkpoints(whole.recorder.folder)[-1]
    other = tiny.job(tmp_path, learning_rate=1e-4, beta=0.5)
    with pytest.raises(RebelError) as refused:
        carry_out(other, latest)
    for words in (str(latest), "--learning_rate was 0.003, is 0.0001", "--beta was 0.0, is 0.5"):
        assert words in str(refused.value)
    assert "--seed" not in str(refused.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_settings_that_do_not_change_what_is_learnt_may_differ(whole: Job, tmp_path: Path) -> None:
    latest = checkpoint.all_checkpoints(whole.recorder.folder)[-1]
    longer = tiny.job(tmp_path, reward=noisy, iterations=4, save_steps=1, tokens_per_micro_batch=64)
    assert carry_out(longer, latest).iteration == 4
    assert {"iterations", "output_dir"} <= FREE and not {"eta", "seed", "learning_rate", "sampling_batch"} & FREE


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(RebelError, match="is no checkpoint of rebel"):
        carry_out(tiny.job(tmp_path / "run"), tmp_path / "other")
    with pytest.raises(RebelError, match="there is no such folder"):
        checkpoint_to_resume(tiny.job(tmp_path, resume_from_checkpoint="nowhere").config)
    with pytest.raises(RebelError, match="has no checkpoint to go on from"):
        checkpoint_to_resume(tiny.job(tmp_path, resume_from_checkpoint=True).config)


def test_a_folder_that_holds_another_run_is_refused_and_only_cleared_when_asked(whole: Job, tmp_path: Path) -> None:
    folder = whole.recorder.folder
    with pytest.raises(RebelError, match=f"--output_dir {folder} holds another run.*--resume.*--overwrite_output_dir"):
        claim_folder(whole.config, resume=False)
    assert claim_folder(whole.config, resume=True) == folder
    mine = tmp_path / "notes.txt"
    mine.write_text("keep me")
    made = tiny.trained(tmp_path, iterations=1)
    assert mine.read_text() == "keep me"
    again = tiny.job(tmp_path, overwrite_output_dir=True)
    claim_folder(again.config, resume=False)
    assert mine.exists() and not checkpoint.all_checkpoints(made.recorder.folder)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_model_that_no_run_made_is_not_written_over(tmp_path: Path) -> None:
    made = tiny.job(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RebelError, match=r"holds a model that is not of `rebel train` \(config.json\); name another"):
        claim_folder(replace(made.config, overwrite_output_dir=True), resume=False)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.job(tmp_path)

    def full(*args: Any) -> None:
        assert not list(tmp_path.glob("checkpoint-*"))
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        made.recorder.checkpoint(checkpoint.Progress())
    assert checkpoint.all_checkpoints(tmp_path) == [] and not list(tmp_path.glob("checkpoint-*"))
    monkeypatch.undo()
    made.recorder.checkpoint(checkpoint.Progress())
    (only,) = checkpoint.all_checkpoints(tmp_path)
    assert only.name == "checkpoint-0" and [p.name for p in tmp_path.iterdir()] == ["checkpoint-0"]
    assert (only / "model.safetensors").exists() and (only / "tokenizer.json").exists()


def test_the_newest_checkpoints_are_kept(whole: Job, tmp_path: Path) -> None:
    assert [p.name for p in checkpoint.all_checkpoints(whole.recorder.folder)] == ["checkpoint-6", "checkpoint-9"]
    for step in (9, 10, 100, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "progress.json").write_text("{}")
    checkpoint.prune(tmp_path, None)
    assert len(checkpoint.all_checkpoints(tmp_path)) == 4
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_random_numbers_of_every_kind_are_put_back() -> None:
    state = checkpoint.rng_state()
    random.setstate((state["python"][0], tuple(state["python"][1]), state["python"][2]))
    expected = [random.random(), numpy.random.rand(), float(torch.rand(()))]
    checkpoint.set_rng_state(state)
    assert [random.random(), numpy.random.rand(), float(torch.rand(()))] == expected


@pytest.mark.parametrize(
    ("last", "now", "every", "expected"), [(0, 3, 4, False), (0, 4, 4, True), (4, 7, 4, False), (6, 9, 4, True)]
)
def test_something_is_due_when_a_multiple_was_passed(last: int, now: int, every: int, expected: bool) -> None:
    assert due(last, now, every) == expected


# -- rewards that fail -------------------------------------------------------------------------------------------------


def test_a_reward_that_raises_stops_the_run_and_loses_nothing(whole: Job, tmp_path: Path) -> None:
    calls: list[int] = []

    def raising(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        calls.append(1)
        if len(calls) >= 4:  # evaluation, iteration 1, evaluation, iteration 2
            numpy.random.rand()
            raise ValueError("no luck")
        return noisy(completion_ids)

    raising.__name__ = "noisy"

    seeded(0)
    with pytest.raises(RunStopped) as stopped:
        tiny.trained(tmp_path, reward=raising)
    message = str(stopped.value)
    assert "noisy raised ValueError" in message and "no luck" in message
    assert "failed_reward.json" in message and "checkpoint-3 is complete" in message
    written = json.loads((tmp_path / "failed_reward.json").read_text())
    assert written["function"] == "noisy" and "no luck" in written["error"]
    (case,) = written["cases"]
    assert case["prompt"].startswith("w") and isinstance(case["completion"], str) and isinstance(case["row"], int)
    seeded(99)
    resumed = tiny.trained(tmp_path, resume=True, reward=noisy)
    assert_same(resumed, whole)


def some_nan(share: float) -> Callable[..., list[float]]:
    """Rewards of which this share is NaN, spread evenly."""

    def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        values = tiny.evenness(completion_ids)
        step = round(1 / share)
        return [math.nan if k % step == 0 else value for k, value in enumerate(values)]

    return reward


def test_too_many_rewards_of_nan_stop_the_run_and_fewer_leave_their_groups(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"25% of this iteration's 24 completions .* --max_failed_rewards allows 20%"):
        tiny.trained(tmp_path / "strict", reward=some_nan(1 / 4), max_failed_rewards=0.2)
    assert (tmp_path / "strict" / "checkpoint-0" / "progress.json").exists()
    made = tiny.trained(tmp_path / "lax", reward=some_nan(1 / 4), max_failed_rewards=0.3, iterations=1)
    row = tiny.rows(tmp_path / "lax")[1]
    assert row["failed_rewards"] == row["dropped_completions"] == 6 and row["dropped_groups"] == 0
    assert all(weight.isfinite().all() for weight in made.recorder.learner.weights)


def test_a_group_with_one_usable_reward_is_dropped(tmp_path: Path) -> None:
    def only_one_for_row_zero(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[float | None]:
        values: list[float | None] = list(tiny.evenness(completion_ids))
        return [None if number % 2 == 0 and k % 4 else v for k, (v, number) in enumerate(zip(values, row, strict=True))]

    tiny.trained(tmp_path, reward=only_one_for_row_zero, max_failed_rewards=1.0, iterations=2)
    for row in tiny.rows(tmp_path)[1:]:
        assert row["dropped_groups"] > 0
        assert row["dropped_completions"] == 4 * row["dropped_groups"] == row["failed_rewards"] / 3 * 4


def test_no_group_left_to_compare_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=r"no group of this iteration .* --max_completion_length"):
        tiny.trained(tmp_path, drop_truncated=True, max_completion_length=1)


# -- what is regressed -----------------------------------------------------------------------------------------------


def test_flat_groups_are_replaced_up_to_the_factor_and_counted_as_samples(tmp_path: Path) -> None:
    def flat_for_even_rows(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[float]:
        return [k * (number % 2) for k, number in enumerate(row)]

    replaced = tiny.trained(tmp_path / "a", reward=flat_for_even_rows, replace_flat_groups=2.0, iterations=2)
    limited = tiny.trained(tmp_path / "b", reward=flat_for_even_rows, replace_flat_groups=0.2, iterations=2)
    plain = tiny.trained(tmp_path / "c", reward=flat_for_even_rows, iterations=2)
    samples = [tiny.rows(made.recorder.folder)[-1]["samples"] for made in (replaced, limited, plain)]
    shares = [tiny.rows(made.recorder.folder)[-1]["flat_groups"] for made in (replaced, limited, plain)]
    assert samples[2] == 2 * 24 and 2 * 24 < samples[1] <= 2 * 28 < samples[0] <= 2 * 72
    assert shares[0] == 0 < shares[2]


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The groups of every optimiser step from now on."""
    seen, update = [], Learner.update

    def noted(self: Learner, groups: list[Any], weigh: Any) -> torch.Tensor:
        seen.append(groups)
        return update(self, groups, weigh)

    monkeypatch.setattr(Learner, "update", noted)
    return seen


def test_held_out_groups_are_not_trained_on_and_stop_the_steps(
    tmp_path: Path, trained_on: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.job(tmp_path, early_stop=True, held_out=0.34, iterations=1, steps_per_iteration=4)
    scripted = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(fit, "held_out_fit", lambda *_: next(scripted))
    claim_folder(made.config, False)
    progress = carry_out(made)
    assert [len(groups) for groups in trained_on] == [1, 1, 1], "two of six are held out, and the last step is left out"
    assert (progress.step, progress.samples) == (3, 24)
    row = tiny.rows(tmp_path)[1]
    assert row["r2_held_out"] is not None and "r2_in_sample" not in row


def test_without_early_stop_every_group_is_trained_on_once_a_pass(tmp_path: Path, trained_on: list[list[Any]]) -> None:
    made = tiny.job(tmp_path, num_iterations=2, iterations=1)
    claim_folder(made.config, False)
    carry_out(made)
    assert [len(groups) for groups in trained_on] == [2] * 6
    passes = [{tuple(group) for groups in trained_on[k : k + 3] for group in groups} for k in (0, 3)]
    assert passes[0] == passes[1] and len(passes[0]) == 6
    assert trained_on[:3] != trained_on[3:], "shuffled anew"


def drawn_with(folder: Path, **settings: Any) -> tuple[list[Any], list[Any]]:
    """All groups and the kept ones of one iteration of a policy that ends often."""
    made = tiny.job(folder, prompts_per_iteration=15, **settings)
    object.__setattr__(made.run.collector.source.sampler.policy, "eos_ids", frozenset(range(2, 9)))
    drawn = made.run.collector(made.run.learner, checkpoint.Progress(), 0, made.recorder)
    return drawn.groups, drawn.kept


def test_the_penalty_is_taken_from_completions_without_an_end_and_from_no_other(tmp_path: Path) -> None:
    plain, _ = drawn_with(tmp_path)
    fined, _ = drawn_with(tmp_path, missing_eos_penalty=0.75)
    seen = set()
    for before, after in zip(plain, fined, strict=True):
        assert before.rollout == after.rollout
        for k, completion in enumerate(after.rollout.completions):
            cost = float(before.rewards[k] - after.rewards[k])
            assert cost == pytest.approx(0.0 if completion.finished else 0.75, abs=1e-6)
            seen.add((completion.finished, length(completion) == 6))
    assert seen == {(True, False), (True, True), (False, True)}, "also one that ends on its last token"


def test_completions_cut_off_leave_their_groups(tmp_path: Path) -> None:
    groups, kept = drawn_with(tmp_path, drop_truncated=True)
    assert all(c.finished for group in kept for c in group.rollout.completions)
    left = [sum(c.finished for c in group.rollout.completions) for group in groups]
    assert [len(group.rollout.completions) for group in kept] == [count for count in left if count >= 2]
    assert min(left) < 4 and len(kept) > 5


def test_eta_auto_is_in_units_of_the_rewards_spread_and_keeps_a_stated_kl(tmp_path: Path) -> None:
    rule = AutoEta(beta=0.0, kl=0.5)
    assert rule.step(4.0) == pytest.approx(rule.step(1.0) / 2)
    assert AutoEta(beta=2.0).step(4.0) == pytest.approx(1 / (2.0 / REACH + 2.0))
    assert AutoEta(beta=2.0).step(0.0) == pytest.approx(1 / 2.0)
    assert (rule.goal(1.0), rule.goal(0.0), AutoEta(beta=0.0).goal(1.0)) == (0.5, None, None)
    moved = {}
    for goal in (0.02, 0.2):
        tiny.trained(tmp_path / str(goal), eta="auto", kl_per_iteration=goal, iterations=4)
        rows = tiny.rows(tmp_path / str(goal))[1:]
        assert all(row["eta"] > 0 for row in rows)
        moved[goal] = sum(row["kl_iteration"] for row in rows) / len(rows)
    assert 2 < moved[0.2] / moved[0.02] < 50


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_rows_begin_with_the_initial_policy_and_have_the_promised_keys(whole: Job) -> None:
    first, *others = tiny.rows(whole.recorder.folder)
    assert {"iteration", "step", "samples", "eval/reward", "eval/length", "eval/unfinished"} <= first.keys()
    assert "reward" not in first and (first["iteration"], first["step"], first["samples"]) == (0, 0, 0)
    for k, row in enumerate(others, 1):
        assert (row["iteration"], row["step"], row["samples"]) == (k, 3 * k, 24 * k)
        for key in ("reward", "reward_std", "rewards/noisy", "kl_iteration", "r2_held_out", "r2_in_sample", "eta"):
            assert isinstance(row[key], float), key
        assert row["eta"] == 2.0 and 0 < row["entropy"] < math.log(tiny.VOCABULARY)
        assert "eval/reward" in row


def test_the_plan_says_how_long_a_run_is(tmp_path: Path) -> None:
    plan = "\n".join(tiny.job(tmp_path).plan)
    assert "6 prompts x 4 completions = 24 samples of at most 6 tokens" in plan
    assert "3 optimiser steps, about 2 prompts (8 completions) each" in plan
    assert "3 iterations = 9 optimiser steps, 72 samples, 1.06 passes over the prompts" in plan
    short = "\n".join(tiny.job(tmp_path, iterations=1, steps_per_iteration=1).plan)
    assert "1 iteration = 1 optimiser step, 24 samples" in short


def test_what_a_reward_writes_down_is_told_apart_by_where(tmp_path: Path) -> None:
    def talks(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("asked", len(completions))
        for taken in ("reward", "step", "iteration", "seconds/total"):
            log_metric(taken, -1.0)
        log_metric("seconds/own", 1e6)
        return [float(len(text)) for text in completions]

    made = tiny.trained(tmp_path, reward=talks)
    first, *later = tiny.rows(tmp_path)
    per_iteration = made.config.prompts_per_iteration * made.config.num_generations
    assert "asked" not in first and first["eval/asked"] == made.config.eval_prompts * made.config.eval_generations
    assert [row["asked"] for row in later] == [per_iteration] * len(later)
    assert all(row["reward"] > 0 and row["eval/reward"] > 0 for row in later), (
        "what the loop measures itself goes first"
    )
    assert [(row["iteration"], row["step"]) for row in [first, *later]] == [(0, 0), (1, 3), (2, 6), (3, 9)]
    written = read_rows(tmp_path / "metrics.jsonl")
    assert all(0 < row["seconds/total"] < 1e5 for row in written), "times that overlap others do not count"


@pytest.mark.parametrize("better", [True, False])
def test_the_best_policy_is_the_result_when_asked(tmp_path: Path, better: bool) -> None:
    made = tiny.trained(
        tmp_path, load_best_model_at_end=True, greater_is_better=better, save_total_limit=None, iterations=4
    )
    rows = tiny.rows(tmp_path)
    best = (max if better else min)(rows, key=lambda row: row["eval/reward"])
    result = AutoModelForCausalLM.from_pretrained(tmp_path)
    start = tiny.small()
    expected = (
        start if best["step"] == 0 else AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best['step']}")
    )
    assert all(torch.equal(a, b) for a, b in zip(result.parameters(), expected.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(result.parameters(), tiny.weights(made), strict=True))
    state = made.recorder.trackers.state
    assert (state.best_metric, state.best_global_step) == (best["eval/reward"], best["step"])
    assert state.best_model_checkpoint == str(tmp_path / "best")


def test_an_unknown_metric_for_the_best_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RebelError, match="--metric_for_best_model eval/joy is none of eval/reward"):
        tiny.trained(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval/joy")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("average", [0.0, 0.8])
def test_what_is_saved_loads_and_has_the_same_log_probs(tmp_path: Path, lora: bool, average: float) -> None:
    start = tiny.small()
    if lora:
        start = get_peft_model(start, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    made = tiny.trained(tmp_path, lm=start, average=average, learning_rate=0.02)
    policy = made.recorder.learner.policy
    base = tiny.small()
    loaded = PeftModel.from_pretrained(base, tmp_path) if lora else AutoModelForCausalLM.from_pretrained(tmp_path)
    again = causal_lm(loaded, AutoTokenizer.from_pretrained(tmp_path))
    with torch.no_grad():
        last = policy.log_prob(tiny.traces())
        with made.recorder.learner.use_average():
            torch.testing.assert_close(again.log_prob(tiny.traces()), policy.log_prob(tiny.traces()))
        assert ((again.log_prob(tiny.traces()) - last).abs().max() > 1e-3) == bool(average)
        assert (last - causal_lm(tiny.small(), tiny.tokenizer()).log_prob(tiny.traces())).abs().max() > 0.1
    assert (tmp_path / "README.md").read_text().startswith("---")


@pytest.mark.parametrize("eta", [5.0, "auto"])
def test_it_learns(tmp_path: Path, eta: float | str) -> None:
    """The reward is the share of even tokens: from a half to nearly all within a few iterations."""
    tiny.trained(
        tmp_path,
        eta=eta,
        kl_per_iteration=1.0,
        num_generations=8,
        prompts_per_iteration=16,
        steps_per_iteration=4,
        sampling_batch=128,
        tokens_per_micro_batch=4096,
        iterations=8,
        learning_rate=1e-2,
    )
    rewards = [row["reward"] for row in tiny.rows(tmp_path)[1:]]
    assert rewards[0] < 0.6 and rewards[-1] > 0.85
