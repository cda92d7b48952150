"""Callbacks of transformers: what they see of a run, what they may ask for, and what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from rebel import checkpoint
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.record import mean_row
from rebel.run_folder import claim_folder
from rebel.trackers import training_arguments


class Listener(TrainerCallback):
    """Notes every event with its step, and asks for `wish` at the end of the iteration that ends with step 6."""

    def __init__(self, wish: str | None = None) -> None:
        self.heard: list[tuple[str, int]] = []
        self.wish = wish

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.heard.append(("init", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.heard.append(("step", state.global_step))
        if self.wish and state.global_step == 6:
            setattr(control, self.wish, True)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.heard.append(("log", state.global_step))

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.heard.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.heard.append(("save", state.global_step))


RARELY = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 100}


@pytest.mark.parametrize(
    ("wish", "event"), [("should_log", "log"), ("should_evaluate", "evaluate"), ("should_save", "save")]
)
def test_what_a_callback_asks_for_is_done_at_the_end_of_that_iteration(tmp_path: Path, wish: str, event: str) -> None:
    plain, asking = Listener(), Listener(wish)
    tiny.trained(tmp_path / "plain", callbacks=[plain], **RARELY)
    tiny.trained(tmp_path / "asking", callbacks=[asking], **RARELY)
    ends = [("step", 3), ("step", 6), ("step", 9)]
    assert [heard for heard in plain.heard if heard[0] == "step"] == ends, "after iterations, and not before the first"
    assert plain.heard[0] == ("init", 0) and plain.heard.count((event, 6)) == 0 and asking.heard.count((event, 6)) == 1
    assert (event, 9) not in asking.heard or (event, 9) in plain.heard, "the wish is heard once"
    kept = [found.name for found in checkpoint.all_checkpoints(tmp_path / "asking")]
    assert kept == (["checkpoint-6"] if event == "save" else [])


def test_early_stopping_of_transformers_works(tmp_path: Path) -> None:
    settings = {"metric_for_best_model": "unfinished", "greater_is_better": True, "load_best_model_at_end": True}
    callback = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=2.0)
    made = tiny.trained(tmp_path, callbacks=[callback], iterations=6, eval_steps=3, **settings)
    assert [row["iteration"] for row in tiny.rows(tmp_path)] == [0, 1], "no share rises by 2"
    assert made.recorder.trackers.state.best_metric is not None


def test_callbacks_and_trackers_see_all_settings(tmp_path: Path) -> None:
    config = RebelConfig(
        output_dir=str(tmp_path), offline=True, eta=3.0, metric_for_best_model="eval_loss", eval_steps=7
    )
    arguments: Any = training_arguments(config)
    assert (arguments.eta, arguments.num_generations, arguments.eval_steps) == (3.0, config.num_generations, 7)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("eval_loss", False)
    assert arguments.eval_strategy is IntervalStrategy.STEPS
    shown = arguments.to_sanitized_dict()
    assert (shown["eta"], shown["beta"], shown["learning_rate"]) == (3.0, 0.0, config.learning_rate)


@pytest.mark.parametrize("name", ["reward", "eval_reward", "eval/reward"])
def test_a_metric_may_be_named_as_transformers_or_the_rows_have_it(name: str) -> None:
    config = RebelConfig(metric_for_best_model=name)
    assert config.best_metric == "eval/reward" and config.larger_is_better
    assert not RebelConfig(metric_for_best_model="eval/loss").larger_is_better
    assert RebelConfig(metric_for_best_model="loss", greater_is_better=True).larger_is_better


def test_the_history_of_a_resumed_run_begins_with_what_was_logged_before(tmp_path: Path) -> None:
    tiny.trained(tmp_path, iterations=2, save_steps=3)
    history = tiny.trained(tmp_path, resume=True, iterations=3).recorder.trackers.state.log_history
    assert [row["step"] for row in history] == [0, 3, 6, 9]
    assert [row["reward"] for row in history[1:]] == [row["reward"] for row in tiny.rows(tmp_path)[1:]]


def test_what_is_logged_is_the_mean_of_the_iterations_since_the_last_time(tmp_path: Path) -> None:
    made = tiny.trained(tmp_path, iterations=5, logging_steps=6, eval_strategy="no")
    history, rows = made.recorder.trackers.state.log_history, tiny.rows(tmp_path)
    assert [row["step"] for row in history] == [0, 6, 12, 15], "with the evaluations at the beginning and the end"
    rewards = [row["reward"] for row in rows[1:]]
    expected = [sum(rewards[:2]) / 2, sum(rewards[2:4]) / 2, rewards[4]]
    torch.testing.assert_close(torch.tensor([row["reward"] for row in history[1:]]), torch.tensor(expected))
    assert [row["samples"] for row in history[1:]] == [rows[2]["samples"], rows[4]["samples"], rows[5]["samples"]]


def test_the_mean_leaves_out_what_a_row_lacks_and_keeps_where_the_run_stands() -> None:
    first = {"iteration": 1, "reward": 1.0, "eta": 5.0, "eval/reward": 3.0, "kl": None, "loss": 4.0}
    last = {"iteration": 2, "reward": 2.0, "eta": 7.0, "eval/reward": 9.0, "kl": 0.5, "loss": float("nan")}
    row = mean_row([first, last])
    assert {k: row[k] for k in ("iteration", "reward", "eta", "eval/reward", "kl")} == {
        "iteration": 2,
        "reward": 1.5,
        "eta": 7.0,
        "eval/reward": 9.0,
        "kl": 0.5,
    }


def test_a_run_that_failed_before_it_learnt_anything_does_not_block_its_folder(tmp_path: Path) -> None:
    with pytest.raises(RebelError, match="--metric_for_best_model eval/joy"):
        tiny.trained(tmp_path, metric_for_best_model="joy")
    assert (tmp_path / "metrics.jsonl").exists() or (tmp_path / "config.yaml").exists()
    tiny.trained(tmp_path)
    assert [row["iteration"] for row in tiny.rows(tmp_path)] == [0, 1, 2, 3]
    with pytest.raises(RebelError, match="holds another run"):
        claim_folder(tiny.job(tmp_path).config, resume=False)
