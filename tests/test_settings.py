"""Settings: where they come from, what types they get, what is refused and in which words."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from rebel.config import RebelConfig
from rebel.elsewhere import ELSEWHERE
from rebel.errors import RebelError
from rebel.from_trl import BATCH, translate_batch
from rebel.settings import dump, known, read_yaml, resolve
from rebel.validate import validate
from rebel.validate.tracking import TRACKERS

RUN = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"], "iterations": 5}


def made_in_python(**values: Any) -> RebelConfig:
    """A config as users build it, types unchecked (the tests' type checker watches the constructor)."""
    config = RebelConfig()
    for name, value in values.items():
        object.__setattr__(config, name, value)
    return config


def refusal(**values: Any) -> str:
    with pytest.raises(RebelError) as refused:
        validate(resolve({**RUN, **values}))
    return str(refused.value)


# Documentation


def test_every_setting_has_a_section_and_a_help_text():
    assert list(known()) == [field.name for field in fields(RebelConfig)]
    assert all(len(setting.help) > 5 and setting.section for setting in known().values())
    assert known()["eta"].section == "the method"
    assert known()["num_generations"].help == "Completions per prompt."
    assert known()["steps_per_generation"].section == "TRL's batch arguments, translated"


# Types


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", 1, 1.0),
        ("eta", "auto", "auto"),
        ("eta", "10", 10.0),
        ("eta", "inf", math.inf),
        ("num_generations", "4", 4),
        ("num_generations", 4.0, 4),
        ("max_steps", "1e3", 1000),
        ("use_peft", "yes", True),
        ("use_peft", "False", False),
        ("track_kl", "none", None),
        ("track_kl", None, None),
        ("eval_strategy", False, "no"),
        ("scale_rewards", True, "group"),
        ("scale_rewards", False, "none"),
        ("reward_funcs", "a.py:f", ["a.py:f"]),
        ("reward_weights", ("1", 2), [1.0, 2.0]),
        ("reward_weights", None, None),
        ("report_to", None, ["none"]),
        ("lr_scheduler_kwargs", None, {}),
        ("chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
        ("chat_template_kwargs", '{"a": [1]}', {"a": [1]}),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "run/checkpoint-8", "run/checkpoint-8"),
        ("run_name", 2024, "2024"),
        ("output_dir", Path("a/b"), "a/b"),
        ("lr_scheduler_type", Enum("Schedule", {"COSINE": "cosine"}).COSINE, "cosine"),
    ],
)
def test_a_value_gets_the_type_of_its_setting(name: str, given: Any, wanted: Any):
    value = getattr(resolve({name: given}), name)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("learning_rate", "fast", "--learning_rate fast: a number is expected"),
        ("learning_rate", None, "--learning_rate null: a number is expected"),
        ("learning_rate", True, "--learning_rate true: a number is expected"),
        ("eta", "big", "--eta big: a number or auto is expected"),
        ("num_generations", 2.5, "--num_generations 2.5: a whole number is expected"),
        ("num_generations", "inf", "--num_generations inf: a whole number is expected"),
        ("use_peft", "perhaps so", "--use_peft 'perhaps so': true or false is expected"),
        ("kl", "reverse", "--kl reverse: proximal or shaped is expected"),
        ("eval_strategy", "epoch", "--eval_strategy epoch: no or steps is expected"),
        ("reward_weights", ["a"], "--reward_weights a: a list of numbers is expected"),
        ("prompt_column", ["a"], "--prompt_column a: text is expected"),
        ("prompt_column", True, "--prompt_column true: text is expected"),
        ("lr_scheduler_kwargs", "3", "--lr_scheduler_kwargs 3: a mapping such as '{key: value}' is expected"),
        ("lr_scheduler_kwargs", "{a", "--lr_scheduler_kwargs '{a': a mapping"),
    ],
)
def test_a_wrong_type_is_named_in_words_of_the_command_line(name: str, given: Any, words: str):
    with pytest.raises(RebelError, match=re.escape(words)):
        resolve({name: given})


def test_defaults_are_not_shared_between_runs():
    resolve({"report_to": None}).report_to.append("wandb")
    assert resolve({"report_to": None}).report_to == ["none"]


# Names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("num_generation", "--num_generation is not known; did you mean --num_generations?"),
        ("learning-rates", "did you mean --learning_rate?"),
        ("qqqq", "--qqqq is not known; --help lists what is"),
        ("epsilon", "--epsilon is not a setting of REBEL: a regression clips no ratio"),
        ("epsilon_high", "clips no ratio"),
        ("vllm_server_port", "use --vllm_server_base_url"),
        ("num_ppo_epochs", "--iterations, --num_train_epochs or --max_steps"),
        ("lr", "--lr is not a setting of REBEL: use --learning_rate"),
        ("epochs", "--iterations, --num_train_epochs or --max_steps"),
        ("batch_size", "--prompts_per_iteration times --num_generations"),
        ("max_new_tokens", "use --max_completion_length"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_or_an_explanation(name: str, words: str):
    with pytest.raises(RebelError, match=re.escape(words)):
        resolve({name: 1})


def test_explanations_name_settings_that_exist_and_hide_none_that_do():
    named = {name for reason in ELSEWHERE.values() for name in re.findall(r"--(\w+)", reason)}
    assert named and named <= known().keys()
    for name in known():
        resolve({name: known()[name].default})


def test_everything_wrong_is_said_at_once():
    with pytest.raises(RebelError) as refused:
        resolve({"beta": "x"}, {"etta": 1}, {"kl": "y"})
    assert len(str(refused.value).splitlines()) == 3


# YAML


def test_yaml_as_users_write_it(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-5\nmax-steps: 8\neval_strategy: no\neta: .inf\nreward_funcs:\n- a\n- b\n")
    config = resolve(read_yaml(file), {"max_steps": "9"})
    assert (config.learning_rate, config.max_steps, config.eval_strategy) == (1e-5, 9, "no")
    assert (config.eta, config.reward_funcs) == (math.inf, ["a", "b"])


def test_no_file_and_an_empty_file_give_the_defaults(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert resolve(read_yaml(None)) == resolve(read_yaml(tmp_path / "empty.yaml")) == RebelConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b\n", "must hold lines such as"), ("a: [1\n", "is not YAML"), ("just text", "must hold lines")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, words: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(RebelError, match=words):
        read_yaml(file)


def test_a_stray_word_is_said_to_be_taken_for_the_file_of_settings():
    """As in `--bf16 maybe`, where the switch stands alone and the word is left over."""
    with pytest.raises(
        RebelError, match=r"maybe cannot be read: No such file .*; a word that belongs to no flag is taken"
    ):
        read_yaml("maybe")


def test_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert sorted(TRACKERS) == sorted(INTEGRATION_TO_CALLBACK)


def test_a_tracker_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch):
    from transformers.integrations import integration_utils

    from rebel.trackers import reporting, training_arguments

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    arguments = training_arguments(RebelConfig(report_to=["wandb"], use_cpu=True))
    with pytest.raises(
        RebelError, match=r"--report_to wandb: WandbCallback requires wandb to be installed.*report_to none"
    ):
        reporting(arguments)


def test_a_missing_file_and_a_folder_cannot_be_read(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RebelError, match="cannot be read"):
            read_yaml(path)


def test_dump_and_back(tmp_path: Path):
    config = resolve(
        {
            **RUN,
            "eta": "inf",
            "beta": 1e-7,
            "reward_weights": [0.1, 3],
            "eval_strategy": "no",
            "run_name": "no",
            "lr_scheduler_kwargs": {"a": {"b": [1, None]}},
            "output_dir": "läufe: 1 # nicht",
            "resume_from_checkpoint": True,
        }
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert resolve(read_yaml(file)) == config
    assert "# the method\neta: .inf\n" in dump(config)


# Validation


def test_a_plain_run_is_valid_and_validation_changes_nothing():
    config = resolve(RUN)
    assert validate(config) == config
    assert validate(RebelConfig(max_steps=3), inputs=False).max_steps == 3


@pytest.mark.parametrize(
    "values",
    [
        {"eta": "inf", "beta": 0.05},
        {"kl": "shaped", "eta": 3, "beta": 0.5},
        {"eta": "auto", "steps_per_iteration": 1, "num_iterations": 2},
        {"eta": 1, "steps_per_iteration": 1},
        {"top_k": 0, "min_p": 0.0, "top_p": 1, "repetition_penalty": 1},
        {"iterations": None, "max_steps": 7},
        {"steps_per_iteration": 32, "prompts_per_iteration": 32},
        {"early_stop": True, "held_out": 0.5, "steps_per_iteration": 16},
        {"held_out": 0},
        {"load_in_4bit": True, "use_peft": True},
        {"reference": "base", "use_peft": True},
        {"reference": "initial_adapter", "adapter_path": "a"},
        {"reference": "model"},
        {"eval_temperature": 0, "missing_eos_penalty": 1},
        {"missing_eos_penalty": 0, "drop_truncated": True},
        {"fp16": True},
        {"reward_funcs": ["a", "b"], "reward_weights": [1, -1]},
        {"save_total_limit": None, "learning_rate": 0, "eval_prompts": 0},
    ],
)
def test_what_is_allowed(values: dict[str, Any]):
    config = resolve({**RUN, **values})
    assert validate(config) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_generations": 1}, "--num_generations 1 leaves nothing to compare; use 2 or more"),
        ({"eta": 0}, "--eta 0: use a positive number"),
        ({"eta": "nan"}, "--eta nan: use a positive number"),
        ({"eta": -1}, "--eta -1"),
        ({"eta": "inf"}, "--eta inf needs a --beta above 0"),
        ({"beta": -0.1}, "--beta -0.1"),
        ({"beta": "inf"}, "--beta inf"),
        ({"beta": "nan"}, "--beta nan"),
        ({"kl": "shaped", "eta": 4, "beta": 0.5}, "--kl shaped with --eta 4 and --beta 0.5 does not converge"),
        ({"kl": "shaped", "eta": "inf", "beta": 0.5}, "does not converge"),
        ({"kl": "shaped"}, "--kl shaped keeps the step at --eta, and --eta auto chooses it"),
        ({"kl_per_iteration": 0}, "--kl_per_iteration 0"),
        ({"temperature": 0}, "--temperature 0"),
        ({"temperature": "nan"}, "--temperature nan"),
        ({"top_p": 0.9}, "--top_p 0.9 is refused in training: completions would come from another"),
        ({"top_k": 50}, "--top_k 50 is refused"),
        ({"min_p": 0.1}, "--min_p 0.1 is refused"),
        ({"repetition_penalty": 1.2}, "--repetition_penalty 1.2 is refused"),
        ({"iterations": None}, "use --iterations, or --max_steps"),
        ({"max_steps": 3}, "--iterations 5 with --max_steps 3: both"),
        ({"iterations": 0}, "--iterations 0: use 1 or more"),
        ({"iterations": None, "max_steps": 0}, "--max_steps 0"),
        ({"iterations": None, "max_steps": -2}, "--max_steps -2"),
        ({"reward_weights": [1, 2]}, "--reward_weights 1 2: 2 for 1 --reward_funcs"),
        ({"reward_weights": ["nan"]}, "use finite numbers"),
        ({"reward_funcs": []}, "no reward"),
        ({"model_name_or_path": None}, "no model"),
        ({"dataset_name": None}, "no prompts"),
        ({"prompts_per_iteration": 0}, "--prompts_per_iteration 0: use 1 or more"),
        ({"num_iterations": 0}, "--num_iterations 0"),
        ({"max_completion_length": -1}, "--max_completion_length -1"),
        ({"eval_prompts": -1}, "--eval_prompts -1: use 0 or more"),
        ({"save_total_limit": 0}, "--save_total_limit 0"),
        ({"bf16": True, "fp16": True}, "--bf16 and --fp16 exclude each other"),
        ({"fp16": True, "use_cpu": True}, "--fp16 needs a CUDA device"),
        ({"dtype": "fp8"}, "--dtype fp8: auto, float32, bfloat16 or float16 is expected"),
        ({"load_in_4bit": True}, "--load_in_4bit without --use_peft"),
        ({"reference": "base"}, "--reference base"),
        ({"lora_r": 32}, "--lora_r 32 is for an adapter, and none is trained; add --use_peft"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules q_proj is for an adapter"),
        (
            {"report_to": ["tensorbord"]},
            "--report_to tensorbord is no tracker of transformers; did you mean tensorboard?",
        ),
        ({"report_to": ["wandb", "qqqq"]}, "--report_to qqqq is no tracker of transformers; none, all, azure_ml, "),
        ({"reference": "initial_adapter", "use_peft": True}, "--reference initial_adapter"),
        ({"early_stop": True, "held_out": 0}, "give --held_out a share above 0"),
        ({"held_out": 1}, "--held_out 1"),
        ({"early_stop": True, "held_out": 0.5, "steps_per_iteration": 17}, "fewer prompts than steps"),
        ({"missing_eos_penalty": 1, "drop_truncated": True}, "--missing_eos_penalty 1 has no effect"),
        ({"missing_eos_penalty": -1}, "--missing_eos_penalty -1"),
        ({"steps_per_iteration": 33}, "--steps_per_iteration 33 with --prompts_per_iteration 32"),
        ({"eval_temperature": -1}, "--eval_temperature -1"),
        ({"average": 1}, "--average 1"),
        ({"average": -0.1}, "--average -0.1"),
        ({"learning_rate": "inf"}, "--learning_rate inf"),
        ({"adam_beta2": 1}, "--adam_beta2 1"),
        ({"max_failed_rewards": 1.5}, "--max_failed_rewards 1.5"),
        ({"replace_flat_groups": -1}, "--replace_flat_groups -1"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "--load_best_model_at_end has nothing"),
        ({"output_dir": " "}, "--output_dir is empty"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": True}, "would delete the checkpoint"),
        ({"resume_from_checkpoint": "run.yaml"}, "put a YAML file before --resume"),
    ],
)
def test_what_is_refused(values: dict[str, Any], words: str):
    message = refusal(**values)
    assert words in message and len(message.splitlines()) == 1


def test_the_output_folder_may_not_hold_what_the_run_reads(tmp_path: Path):
    model = tmp_path / "run" / "checkpoint-8"
    model.mkdir(parents=True)
    given = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "run")}
    assert "would delete --model_name_or_path" in refusal(**given, overwrite_output_dir=True)
    validate(resolve(RUN, given))
    validate(resolve(RUN, given, {"output_dir": str(tmp_path / "other"), "overwrite_output_dir": True}))
    validate(resolve(RUN, {"output_dir": ".", "overwrite_output_dir": True}))  # m and d are names on the hub


def test_objects_in_python_replace_the_inputs():
    config = made_in_python(learning_rate="1e-4", eta=10, report_to="none", max_steps=4, output_dir=Path("o"))
    checked = validate(config, inputs=False)
    assert (checked.learning_rate, checked.eta, checked.report_to) == (1e-4, 10.0, ["none"])
    assert checked.output_dir == "o" and isinstance(checked.eta, float)
    validate(made_in_python(reward_weights=[1, 2], max_steps=4), inputs=False)
    with pytest.raises(RebelError, match="no model"):
        validate(config)
    with pytest.raises(RebelError, match="--kl sideways"):
        validate(made_in_python(kl="sideways", max_steps=4), inputs=False)


# TRL's batch arguments


def test_nothing_of_trl_is_left_as_it_is():
    config = resolve(RUN)
    assert translate_batch(config, 4) == (config, [])


@pytest.mark.parametrize(
    ("given", "world_size", "prompts", "steps"),
    [
        ({"per_device_train_batch_size": 16}, 1, 2, 1),
        ({"gradient_accumulation_steps": 8}, 1, 8, 1),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}, 2, 8, 1),
        ({"per_device_train_batch_size": 8, "steps_per_generation": 8}, 1, 8, 8),
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 8},
            2,
            16,
            4,
        ),
        ({"per_device_train_batch_size": 8, "generation_batch_size": 64}, 2, 8, 4),
    ],
)
def test_trl_batch_arguments_translated(given: dict[str, int], world_size: int, prompts: int, steps: int):
    config, lines = translate_batch(resolve(RUN, given, {"num_iterations": 2}), world_size)
    assert (config.prompts_per_iteration, config.steps_per_iteration, config.num_iterations) == (prompts, steps, 2)
    assert all(getattr(config, name) is None for name in BATCH)
    assert translate_batch(config, world_size) == (config, [])
    text = "\n".join(lines)
    assert f"prompts_per_iteration {prompts} " in text and f"steps_per_iteration {steps} " in text
    assert f"{prompts * 8} completions an iteration" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"generation_batch_size": 64, "steps_per_generation": 2}, "say the same"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: use 1 or more"),
        ({"generation_batch_size": 60}, "60 (generation_batch_size) is no multiple of 8"),
        ({"per_device_train_batch_size": 6}, "6 (completions) is no multiple of 8 (num_generations)"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
            "6 (steps_per_generation) is no multiple of 4 (gradient_accumulation_steps)",
        ),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "is no multiple"),
        ({"gradient_accumulation_steps": 8, "prompts_per_iteration": 5}, "--prompts_per_iteration 5 contradicts"),
        ({"num_generations": 0, "steps_per_generation": 2}, "is no multiple of 0"),
    ],
)
def test_trl_batch_arguments_that_do_not_fit(given: dict[str, int], words: str):
    with pytest.raises(RebelError, match=re.escape(words)):
        translate_batch(resolve(RUN, given), 1)


def test_the_translation_is_trls_own():
    """TRL computes the batch of a generation when its configuration is made; ours must say the same numbers."""
    from trl import GRPOConfig

    for per_device, accumulation, generation in itertools.product(
        (2, 8), (1, 4), ({}, {"steps_per_generation": 8}, {"generation_batch_size": 64})
    ):
        given = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        given |= {**generation, "num_generations": 2}
        theirs = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **given)
        config, _ = translate_batch(resolve(RUN, given), theirs.world_size)
        assert config.prompts_per_iteration * 2 == theirs.generation_batch_size
        assert config.steps_per_iteration * accumulation == theirs.steps_per_generation


# vLLM

SERVER = {"sampler": "vllm", "vllm_mode": "server", "vllm_server_base_url": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vllm_deadline": 5.0}, "--vllm_deadline is for vLLM: add --sampler vllm"),
        ({"sampler": "vllm", "vllm_deadline": 0.0}, "--vllm_deadline 0: use a positive number of seconds"),
        ({"sampler": "vllm", "vllm_gpu_memory_utilization": 1.5}, "use a share between 0 and 1"),
        ({"sampler": "vllm", "vllm_max_mismatch": -1.0}, "use a positive number of nats"),
        ({"sampler": "vllm", "vllm_server_base_url": "http://x"}, "is for a server: add --vllm_mode server"),
        ({"sampler": "vllm", "vllm_weights_dir": "x"}, "--vllm_weights_dir x is for a server"),
        ({"sampler": "vllm", "vllm_mode": "server"}, "where it is is not given; use --vllm_server_base_url"),
        (SERVER | {"vllm_server_base_url": "host:8000"}, "an address such as http://127.0.0.1:8000 is expected"),
        (SERVER | {"vllm_server_base_url": "http://key@host"}, "is expected, without a key"),
        ({"sampler": "vllm", "use_peft": True, "load_in_4bit": True}, "--sampler vllm with --load_in_4bit"),
        ({"sampler": "vllm", "offline": True}, "--sampler vllm with --offline: nothing is drawn"),
        ({"sampler": "vllm", "from_rollouts": "x", "iterations": None}, "with --from_rollouts: nothing is drawn"),
        ({"one_step_ahead": True}, "add --sampler vllm --vllm_mode server"),
        ({"sampler": "vllm", "one_step_ahead": True}, "add --sampler vllm --vllm_mode server"),
        (SERVER | {"one_step_ahead": True, "rounds": 1, "iterations": None}, "--one_step_ahead with --rounds"),
        (SERVER | {"one_step_ahead": True, "replace_flat_groups": 1.0}, "which prompts come next is not known"),
        ({"sampler": "vllm", "top_p": 0.9}, "--top_p 0.9 is refused"),
        (
            {"sampler": "vllm", "model_name_or_path": None, "pipeline_name_or_path": "p"},
            "--sampler vllm is for language models and has no meaning for images; leave it out",
        ),
    ],
)
def test_settings_of_vllm_that_make_no_sense(given: dict[str, Any], words: str):
    run = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["f"], "iterations": 1}
    with pytest.raises(RebelError, match=re.escape(words)):
        validate(RebelConfig(**{**run, **given}))


@pytest.mark.parametrize(
    "given",
    [
        {**SERVER, "one_step_ahead": True, "vllm_weights_dir": "x", "vllm_deadline": 3.0},
        {"sampler": "vllm", "vllm_gpu_memory_utilization": 0.5, "vllm_max_mismatch": 0.1},
    ],
)
def test_settings_of_vllm_that_do(given: dict[str, Any]):
    config = RebelConfig(model_name_or_path="m", dataset_name="d", reward_funcs=["f"], iterations=1, **given)
    assert validate(config) == config


def test_paths_that_lead_nowhere_are_named_together_before_anything_is_loaded(tmp_path: Path) -> None:
    given = {
        "model_name_or_path": str(tmp_path / "model"),
        "adapter_path": "./adapter",
        "dataset_name": "rows.jsonl",
        "reward_funcs": [str(tmp_path / "mine.py:score"), "exact_match"],
        "iterations": 1,
    }
    with pytest.raises(RebelError) as refused:
        validate(RebelConfig(**given))
    said = str(refused.value)
    for words in (
        f"--model_name_or_path {tmp_path / 'model'}: there is no such folder",
        "--adapter_path ./adapter: there is no such folder",
        "--dataset_name rows.jsonl: there is no such file",
        f"--reward_funcs {tmp_path / 'mine.py:score'}: there is no file {tmp_path / 'mine.py'}",
    ):
        assert words in said
    (tmp_path / "mine.py").touch()
    (tmp_path / "model").mkdir()
    there = given | {"adapter_path": None, "dataset_name": "owner/rows"}
    validate(RebelConfig(**there))


def test_a_length_given_later_takes_the_place_of_any_given_before() -> None:
    before = {"iterations": 6, "eta": 2.0}
    assert (resolve(before, {"max_steps": 8}).iterations, resolve(before, {"max_steps": 8}).max_steps) == (None, 8)
    assert (resolve(before, {"rounds": 3}).iterations, resolve(before, {"rounds": 3}).rounds) == (None, 3)
    assert resolve(before, {"from_rollouts": "rolls"}).iterations is None
    assert resolve(before, {"eta": 3.0}).iterations == 6
    assert resolve({"num_train_epochs": 1.0}, {"max_steps": "-1"}).num_train_epochs == 1.0
    for nothing in ("null", None):
        lap = resolve({"num_train_epochs": 1.0}, {"iterations": nothing})
        assert (lap.num_train_epochs, lap.iterations) == (1.0, None), "a length of null takes no length's place"
    assert resolve({"num_train_epochs": 1.0, "max_steps": 4}).num_train_epochs == 1.0, (
        "both in one layer: the checks complain"
    )
