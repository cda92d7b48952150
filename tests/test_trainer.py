"""RebelTrainer as a user of TRL's trainers and of transformers' meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from rebel import RebelConfig, RebelTrainer
from rebel.errors import RebelError, RunStopped
from rebel.trainer import check_arguments, prompts, reward_list

ROWS = [{"prompt": f"w{k} w{k + 1}", "row": k} for k in range(12)]


def trainer(folder: Path, **given: Any) -> RebelTrainer:
    settings = {"kl_per_iteration": None, **given.pop("settings", {})}
    usual = {
        "model": tiny.small(),
        "reward_funcs": tiny.evenness,
        "args": RebelConfig(**{**tiny.SETTINGS, "output_dir": str(folder), **settings}),
        "train_dataset": ROWS[3:],
        "eval_dataset": ROWS[:3],
        "processing_class": tiny.tokenizer(),
    }
    return RebelTrainer(**(usual | given))


def test_what_train_returns_is_what_transformers_returns(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    found = made.train()
    assert isinstance(found, TrainOutput) and found.global_step == made.state.global_step == 9
    losses = [row["loss"] for row in tiny.rows(tmp_path) if "loss" in row]
    assert found.training_loss == pytest.approx(sum(losses) / len(losses)) == found.metrics["train_loss"]
    assert (found.metrics["train_iterations"], found.metrics["train_samples"]) == (3, 72)
    assert found.metrics["train_runtime"] > 0


def test_train_and_save_leave_the_best_policy(tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": False}
    made = trainer(tmp_path, settings=settings)
    made.train()
    made.save_model()
    made.save_model(str(tmp_path / "other"))
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    for folder in (tmp_path, tmp_path / "other"):
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), best.parameters(), strict=True))
    assert made.evaluate()["eval_reward"] == pytest.approx(made.state.best_metric)


def test_evaluations_are_heard_of_and_may_be_on_other_prompts(tmp_path: Path) -> None:
    heard: list[dict[str, float]] = []

    class Listener(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **rest: Any) -> None:
            heard.append(metrics)

    made = trainer(tmp_path, callbacks=Listener())
    seen: list[int] = []
    prompts = Dataset.from_list(ROWS[:7])
    own, other = made.evaluate(), made.evaluate(prompts)
    assert heard == [own, other] and set(own) == set(other)
    assert [row["eval_reward"] for row in made.state.log_history] == [own["eval_reward"], other["eval_reward"]]
    assert made.eval_dataset == ROWS[:3] and not seen
    with pytest.raises(RebelError, match="of a trainer that has an eval_dataset"):
        trainer(tmp_path / "none", eval_dataset=None).evaluate(prompts)


def test_what_scripts_of_trl_ask_a_trainer_for_is_there(tmp_path: Path) -> None:
    made = trainer(tmp_path, callbacks=None)
    made.accelerator.print("a line")
    assert made.is_world_process_zero() and made.train_dataset == ROWS[3:]
    assert made.optimizer.param_groups[0]["lr"] == made.lr_scheduler.get_last_lr()[0]
    made.add_callback(TrainerCallback)
    before = len(made.callback_handler.callbacks)
    made.remove_callback(TrainerCallback)
    assert len(made.callback_handler.callbacks) == before - 1


def test_a_run_that_stopped_says_how_python_goes_on(tmp_path: Path) -> None:
    def failing(prompts: list[str], **rest: Any) -> list[float]:
        raise ValueError("no")

    with pytest.raises(RunStopped, match=r"go on with: trainer.train\(resume_from_checkpoint=True\)"):
        trainer(tmp_path, reward_funcs=failing).train()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reward_funcs": None}, "and for completions that are drawn a reward is missing: --reward_funcs"),
        ({"processing_class": None}, "give it as processing_class"),
        ({"settings": {"load_best_model_at_end": True}, "eval_dataset": None}, "--load_best_model_at_end has nothing"),
        ({"settings": {"warmup_steps": 2, "lr_scheduler_type": "constant"}}, "constant has no effect; use"),
        ({"settings": {"lr_scheduler_type": "cosine_with_min_lr"}}, "--lr_scheduler_type cosine_with_min_lr with"),
        ({"settings": {"lr_scheduler_type": "wavy"}}, "--lr_scheduler_type wavy is not a valid"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RebelError, match=words):
        trainer(tmp_path, **given)


@pytest.mark.parametrize(
    ("model", "args", "lora", "words"),
    [
        ("m", TrainingArguments(), None, "args is a TrainingArguments; use RebelConfig"),
        (None, None, None, "model is a NoneType; give a name, a folder, or a causal language model"),
        ("m", None, "lora", "peft_config is a str; give a configuration of peft"),
    ],
)
def test_arguments_of_another_kind_are_named(model: Any, args: Any, lora: Any, words: str) -> None:
    with pytest.raises(RebelError, match=words):
        check_arguments(model, args, lora)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DatasetDict(a=Dataset.from_list(ROWS)), r"mine has several parts \(a\); give one of them: mine=data\['a'\]"),
        ({"a": ROWS}, r"several parts \(a\)"),
        (Dataset.from_list(ROWS).to_iterable_dataset(), "IterableDataset, which has no length"),
        (None, "mine is missing: rows with a column 'prompt'"),
    ],
)
def test_data_of_another_kind_are_named(data: Any, words: str) -> None:
    with pytest.raises(RebelError, match=words):
        prompts(data, RebelConfig(), "mine")


def test_a_reward_of_another_kind_is_named() -> None:
    with pytest.raises(RebelError, match="reward_funcs has a int; give functions, names, or reward models"):
        reward_list([tiny.evenness, 3])
    assert reward_list(tiny.evenness) == [tiny.evenness] and reward_list(None) == []


def test_an_adapter_and_a_configuration_of_a_new_one_exclude_each_other(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(RebelError, match="the model has an adapter, and peft_config is for a new one"):
        trainer(tmp_path, model=get_peft_model(tiny.small(), lora), peft_config=lora)


def test_layers_that_the_model_lacks_are_said(tmp_path: Path) -> None:
    wrong = LoraConfig(target_modules=["nosuch"], task_type="CAUSAL_LM")
    with pytest.raises(RebelError, match=r"--lora_target_modules .*nosuch.* Use all-linear"):
        trainer(tmp_path, peft_config=wrong)


def test_names_that_are_no_settings_are_explained_together() -> None:
    with pytest.raises(RebelError) as refused:
        RebelConfig(**{"epsilon": 0.2, "lerning_rate": 1.0, "dataloader_num_workers": 2})
    for words in ("--epsilon is not a setting", "did you mean --learning_rate?", "no loader is needed"):
        assert words in str(refused.value)


def test_without_an_account_the_hub_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def nobody(self: HfApi) -> None:
        raise OSError("not logged in")

    monkeypatch.setattr(HfApi, "whoami", nobody)
    made = trainer(tmp_path / "run", settings={"push_to_hub": True})
    with pytest.raises(RebelError, match=r"--push_to_hub: .*not logged in.*`hf auth login`"):
        made.train()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(HfApi, "create_repo", nobody)
    with pytest.raises(RunStopped, match=r"could not be uploaded: .*hf upload"):
        made.push_to_hub()
