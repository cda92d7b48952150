"""Runs of image pipelines from first to last: resumed, saved and loaded again, and refused in one line."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_images
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from test_loop import StopAt

from rebel import job
from rebel.build.images import build_image_job
from rebel.build.job import Job
from rebel.build.pipeline import ADAPTER, LORA, save_adapter, saved_pipeline, to_diffusion, trainable
from rebel.cli import main
from rebel.config import RebelConfig
from rebel.errors import RebelError, RunStopped
from rebel.job import carry_out
from rebel.policies.diffusion import Diffusion
from rebel.report import read_rows
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import PerCompletion
from rebel.samplers.denoise import Denoise
from rebel.types import Prompt
from rebel.validate import validate

PROMPTS = [Prompt("a cat"), Prompt("the red house")]
GIVEN: dict[str, Any] = {
    "pipeline_name_or_path": "a/pipeline",
    "dataset_name": "owner/prompts",
    "reward_funcs": ["exact_match"],
    "iterations": 2,
}


@pytest.fixture(autouse=True, scope="module")
def no_report() -> Iterator[None]:
    """Its page is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "write_report", lambda folder: folder)
        yield


def images(policy: Diffusion) -> np.ndarray:
    rollouts = Denoise(policy, 4)(PROMPTS, 2, seed=3)
    return np.stack([np.asarray(c.content, dtype=int) for rollout in rollouts for c in rollout.completions])


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Up to a brightness of 1 in 255: where tensors lie in memory may change the last bit of a matrix product."""
    return bool(np.abs(one - other).max() <= 1)


def policy_of(made: Job) -> Diffusion:
    policy = made.run.learner.policy
    assert isinstance(policy, Diffusion)
    return policy


# -- interrupted ----------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    **{"eta": "auto", "beta": 0.02, "average": 0.6, "num_iterations": 2, "lr_scheduler_type": "cosine"},
    **{"credit": "step", "same_noise": True, "kl_per_iteration": 0.05, "save_steps": 4, "iterations": 2},
}


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Bit for bit: weights, average, rows and the adapter on disk."""
    whole = tiny_images.trained(tmp_path / "whole", **EVERYTHING)
    with pytest.raises(RunStopped, match="SIGTERM"):
        tiny_images.trained(tmp_path / "parts", callbacks=[StopAt(4)], **EVERYTHING)
    parts = tiny_images.trained(tmp_path / "parts", resume=True, **EVERYTHING)
    mine, its = whole.recorder.learner, parts.recorder.learner
    assert all(torch.equal(a, b) for a, b in zip(mine.weights, its.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mine.averaged, its.averaged, strict=True))
    assert tiny.rows(tmp_path / "whole") == tiny.rows(tmp_path / "parts")
    drawn, again = (read_rows(tmp_path / name / "samples.jsonl") for name in ("whole", "parts"))
    assert drawn == again and drawn
    pictures = sorted(path.name for path in (tmp_path / "whole" / "images").iterdir())
    assert pictures == sorted(path.name for path in (tmp_path / "parts" / "images").iterdir())
    for name in pictures:
        assert (tmp_path / "whole" / "images" / name).read_bytes() == (
            tmp_path / "parts" / "images" / name
        ).read_bytes()
    whole_adapter, its_adapter = (load_file(tmp_path / name / LORA) for name in ("whole", "parts"))
    assert whole_adapter.keys() == its_adapter.keys()  # the file's header has no fixed order
    assert all(torch.equal(weight, its_adapter[name]) for name, weight in whole_adapter.items())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_rows_say_what_images_have_and_no_more(tmp_path: Path) -> None:
    made = tiny_images.trained(tmp_path, iterations=1)
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert not [name for name in row if "length" in name or "token" in name or "entropy" in name]
    assert row["images_per_second_training"] > 0 and row["samples"] == 12 and "kl_initial" in row
    assert "eval/reward" in row and "eval/kl_initial" in row
    plan = "\n".join(made.plan)
    assert "10,048 of" not in plan and "UNet2DConditionModel" in plan and "12 samples of 5 denoising steps" in plan


def test_ppo_runs_in_the_same_loop_and_regresses_nothing(tmp_path: Path) -> None:
    made = tiny_images.trained(tmp_path, algorithm="ppo_clip", clip_range=0.1, iterations=1)
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert not {"eta", "loss", "r2_held_out", "r2_in_sample"} & row.keys()
    assert row["kl_iteration"] > 0 and row["samples"] == 12
    assert any("PPO" in line for line in made.plan)


# -- saved and loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(tiny_images.FAMILIES))
def test_a_saved_adapter_draws_the_same_images(family: str, tmp_path: Path) -> None:
    """In the pipeline that it began with, by diffusers' own load_lora_weights."""
    steps = tiny_images.STEPS[family]
    config = RebelConfig(
        pipeline_name_or_path=tiny_images.saved(family), lora_r=2, denoising_steps=steps, image_size=16
    )
    policy = to_diffusion(trainable(tiny_images.pipeline(family), config), config)
    before = images(policy)
    with torch.no_grad():
        for weight in policy.trained:
            weight += 0.1 * torch.randn_like(weight)
    save_adapter(policy.pipeline, tmp_path)
    drawn = images(policy)
    assert not same(drawn, before), "an adapter that changes nothing would pass"
    assert same(images(to_diffusion(saved_pipeline(tmp_path, config), config)), drawn)
    pipeline = DiffusionPipeline.from_pretrained(tiny_images.saved(family))
    pipeline.load_lora_weights(str(tmp_path))
    assert same(images(to_diffusion(pipeline, config)), drawn)


def test_the_result_of_a_run_is_the_adapter_and_its_checkpoint_goes_on(tmp_path: Path) -> None:
    made = tiny_images.trained(tmp_path / "first", iterations=1)
    drawn = images(policy_of(made))
    assert same(images(to_diffusion(saved_pipeline(tmp_path / "first", made.config), made.config)), drawn)
    again = tiny_images.job(tmp_path / "second", adapter_path=str(tmp_path / "first"), beta=0.1, iterations=1)
    policy = policy_of(again)
    assert same(images(policy), drawn)
    (rollout,) = Denoise(policy, 2)(PROMPTS[:1], 2, seed=0)
    reference = again.run.reference
    assert reference is not None
    with torch.no_grad():  # pi_ref is the adapter that it goes on from, not the pipeline without it
        torch.testing.assert_close(reference(rollout.traces), policy.log_prob(rollout.traces), rtol=1e-5, atol=1e-3)
    card = (tmp_path / "first" / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" in card and "load_lora_weights" in card and "diffusers" in card


def test_a_pipeline_trained_whole_is_saved_whole(tmp_path: Path) -> None:
    made = tiny_images.trained(tmp_path, use_peft=False, iterations=1, beta=0.1, learning_rate=1e-2)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline, StableDiffusionPipeline)
    drawn = images(policy_of(made))
    assert same(images(to_diffusion(pipeline, made.config)), drawn)
    untouched = tiny_images.pipeline("sd15")
    assert not same(images(to_diffusion(untouched, made.config)), drawn)


def test_an_adapter_is_saved_by_peft_where_a_pipeline_has_no_way_of_its_own(tmp_path: Path) -> None:
    class Bare(StableDiffusionPipeline):
        save_lora_weights = None  # pyright: ignore

    config = RebelConfig(pipeline_name_or_path=tiny_images.saved("sd15"), lora_r=2, denoising_steps=5)
    pipeline = trainable(tiny_images.pipeline("sd15"), config)
    pipeline.__class__ = Bare
    policy = to_diffusion(pipeline, config)
    with torch.no_grad():
        for weight in policy.trained:
            weight += 0.1 * torch.randn_like(weight)
    save_adapter(pipeline, tmp_path)
    assert (tmp_path / ADAPTER).exists() and not (tmp_path / LORA).exists()
    assert same(images(to_diffusion(saved_pipeline(tmp_path, config), config)), images(policy))


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, a reward and a pipeline, in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(tiny_images.TEXTS) + "\n")
    (tmp_path / "rewards.py").write_text("from tiny_images import redness\n")
    shutil.copytree(tiny_images.saved("sd15"), tmp_path / "pipeline")
    return tmp_path


def train(*more: str) -> int:
    flags = "--pipeline_name_or_path ./pipeline --dataset_name prompts.txt --reward_funcs tiny_images:reward"
    sizes = "--num_generations 2 --prompts_per_iteration 2 --steps_per_iteration 1 --num_iterations 1 --eval_prompts 2"
    rest = "--iterations 1 --denoising_steps 3 --lora_r 2 --output_dir run --use_cpu --disable_tqdm"
    return main(["train", *flags.split(), *sizes.split(), *rest.split(), *more])


def test_train_and_sample_on_the_command_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    assert (files / "run" / LORA).exists() and (files / "run" / "README.md").exists()
    assert main(["sample", "run", "--prompt", "a cat", "--prompt", "a dog", "--n", "2"]) == 0
    assert "run/samples/2-1.png" in capsys.readouterr().out
    assert len(list((files / "run" / "samples").glob("*.png"))) == 4


def test_weights_that_are_not_there_are_said_in_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (files / "pipeline" / "unet").glob("*.safetensors"):
        file.unlink()
    assert train() == 2
    said = capsys.readouterr().err
    assert "--pipeline_name_or_path ./pipeline: its pipeline cannot be loaded" in said and "Traceback" not in said
    shutil.rmtree(files / "pipeline")
    assert train() == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--noise_level", "0"], "--noise_level 0: use a positive number"),
        (["--lora_target_modules", "nothing"], "--lora_target_modules nothing: "),
        (["--credit", "word"], "--credit word"),
        (["--model_name_or_path", "gpt2"], "give one of them"),
        (["--judge_funcs", "tiny_images:reward"], "a judge shows what the reward does not"),
        (["--max_completion_length", "9"], "--max_completion_length 9 is for language models"),
        (["--offline"], "--offline true is for language models"),
        (["--algorithm", "ppo_clip", "--pairing", "extremes"], "use --pairing all"),
        (["--denoising_steps", "0"], "--denoising_steps 0: use 1 or more"),
        (["--denoising_steps", "2000"], "the pipeline draws nothing with these settings: `num_inference_steps`: 2000"),
        (["--image_size", "15"], "have to be divisible by 8 but are 15"),
        (["--adapter_path", "run"], "--adapter_path run has neither"),
        (["--reference", "base", "--no-use_peft", "--beta", "0.1"], "--reference base"),
    ],
)
def test_wrong_settings_are_said_in_one_line(
    flags: list[str], said: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*flags) == 2
    found = capsys.readouterr().err
    assert said in found and "Traceback" not in found


def test_settings_of_images_are_refused_for_text() -> None:
    with pytest.raises(RebelError, match="--credit step is for pipelines"):
        validate(RebelConfig(**{**GIVEN, "pipeline_name_or_path": None, "model_name_or_path": "m", "credit": "step"}))
    validate(RebelConfig(**GIVEN))


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RebelError, match=r"rebel-rl\[diffusion\]"):
        job.prepare(RebelConfig(**GIVEN))


def test_a_run_of_a_language_model_loads_no_diffusers() -> None:
    code = "import sys, rebel.job, rebel.trainer\nassert 'diffusers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


# -- what goes wrong on the way -------------------------------------------------------------------------------------


class Prudish(StableDiffusionPipeline):
    """Its safety checker blacks out every third image."""

    def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> Any:
        flags = [k % 3 == 0 for k in range(len(image))]
        return torch.stack([-torch.ones_like(x) if flag else x for x, flag in zip(image, flags, strict=True)]), flags


def test_images_that_a_safety_checker_blacks_out_are_counted_and_not_learnt_from(tmp_path: Path) -> None:
    config = RebelConfig(
        **{**tiny_images.SETTINGS, "denoising_steps": 5, "output_dir": str(tmp_path), "iterations": 1},
        pipeline_name_or_path="prudish",
    )
    pipeline = trainable(tiny_images.pipeline("sd15"), config)
    pipeline.__class__ = Prudish
    pipeline.safety_checker = tiny_images.clip()  # any model: what counts is what run_safety_checker says
    seen: list[Any] = []

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return tiny_images.redness(completions, [])

    prompts = [Prompt(text) for text in tiny_images.TEXTS]
    made = build_image_job(
        config, pipeline, lambda notes: Weighted([PerCompletion(reward, notes=notes)]), (prompts[2:], prompts[:2])
    )
    update = made.run.learner.update
    made.run.learner.update = lambda groups, weigh: (seen.extend(groups), update(groups, weigh))[1]  # pyright: ignore
    carry_out(made)
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    assert row["unfinished"] == pytest.approx(1 / 2)  # of 4 images at once the first and the last
    assert row["dropped_completions"] >= 6
    assert sum(map(len, seen)) == 12 - row["dropped_completions"]
    assert any("safety" in line for line in made.plan)


def test_a_reward_of_the_wrong_length_is_said(tmp_path: Path) -> None:
    def one(**columns: Any) -> list[float]:
        return [1.0]

    with pytest.raises(RebelError, match="1 values for 2 completions"):
        tiny_images.trained(tmp_path, reward=one)


def test_a_reward_without_a_usable_value_stops_the_run_and_loses_nothing(tmp_path: Path) -> None:
    def nan(completions: list[Any], **columns: Any) -> list[float]:
        return [float("nan")] * len(completions)

    with pytest.raises(RunStopped, match="had no usable reward"):
        tiny_images.trained(tmp_path, reward=nan)
