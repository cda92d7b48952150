"""The images' task that needs no download: its model and pipeline, its reward and judge, and what REBEL makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from rebel.build.pipeline import load_pipeline
from rebel.cli import main
from rebel.errors import RebelError
from rebel.report import read_rows
from rebel.tasks import digits
from rebel.tasks.digits import LEAST, examiner, ink_of, log_probability, quickstart, svm_accuracy, teacher, written
from rebel.tasks.digits_model import Denoiser, DigitsPipeline, Recipe, as_latents, digit_of, mixed_up, taught

QUICK = Recipe(width=96, layers=2, steps=700, batch=128)


def picture(ink: np.ndarray) -> Image.Image:
    """A real digit as the pipeline would draw it."""
    grey = np.round(ink.reshape(8, 8) * 255).astype(np.uint8)
    return Image.fromarray(grey).resize((32, 32), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def pipeline() -> DigitsPipeline:
    """An untrained model is enough for what does not depend on what it draws."""
    made = taught(as_latents(written().ink), torch.as_tensor(written().digit), Recipe(32, 1, steps=1), seed=0)
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipeline: Any, prompts: list[str], seed: int = 3, **more: Any) -> Any:
    return pipeline(prompts, generator=torch.Generator().manual_seed(seed), **more).images


def test_a_prompt_names_one_digit() -> None:
    assert [digit_of(text) for text in ("7", "a handwritten 0")] == [7, 0]
    for text in ("seven", "7 and 8"):
        with pytest.raises(RebelError, match="the model draws one"):
            digit_of(text)


def test_half_of_the_labels_are_dealt_out_anew_among_themselves() -> None:
    labels = torch.arange(1000) % 10
    dealt = mixed_up(labels, 0.5, torch.Generator().manual_seed(0))
    assert dealt.sort().values.equal(labels.sort().values)
    assert float((dealt == labels).float().mean()) == pytest.approx(0.55, abs=0.03)
    assert mixed_up(labels, 0.0, torch.Generator()).equal(labels)


def test_pixels_and_pictures_are_the_ink_that_was_written(pipeline: DigitsPipeline) -> None:
    ink = written().ink[:5]
    assert np.allclose(ink_of(pipeline.pictures(as_latents(ink))), ink, atol=0.5 / 255 + 1e-6)


def test_the_pipeline_does_as_others_of_diffusers(pipeline: DigitsPipeline) -> None:
    images = drawn(pipeline, ["3", "7"])
    assert [image.size for image in images] == [(32, 32)] * 2
    latents = drawn(pipeline, ["3", "7"], output_type="latent")
    assert latents.shape == (2, 1, 8, 8) and drawn(pipeline, ["3", "7"], output_type="latent").equal(latents)
    assert not drawn(pipeline, ["4", "7"], output_type="latent")[0].equal(latents[0])
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    still = [drawn(pipeline, ["3"], seed, latents=start, eta=0.0, output_type="latent") for seed in (1, 2)]
    noisy = [drawn(pipeline, ["3"], seed, latents=start, output_type="latent") for seed in (1, 2)]
    assert still[0].equal(still[1]) and not noisy[0].equal(noisy[1])


def test_the_loader_of_pipelines_brings_back_the_same_pictures(pipeline: DigitsPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    assert isinstance(again, DigitsPipeline) and isinstance(again.denoiser, Denoiser)
    again.set_progress_bar_config(disable=True)
    assert_close(*(drawn(made, ["3"], output_type="latent") for made in (again, pipeline)))


def test_reward_and_judge_know_real_digits_that_they_were_not_fitted_to() -> None:
    data = written()
    assert teacher().score(data.ink[1::2], data.digit[1::2]) > 0.93
    assert examiner().score(data.ink[::2], data.digit[::2]) > 0.98


def test_the_reward_is_the_log_probability_of_the_digit_asked_for() -> None:
    data = written()
    images, asked = [picture(ink) for ink in data.ink[:4]], [int(digit) for digit in data.digit[:4]]
    logits = ink_of(images) @ teacher().coef_.T + teacher().intercept_
    by_hand = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    right = log_probability(images, [str(digit) for digit in asked])
    assert right == pytest.approx([by_hand[k, digit] for k, digit in enumerate(asked)], rel=1e-6)
    wrong = log_probability(images, [str((digit + 5) % 10) for digit in asked])
    assert min(wrong) == LEAST and max(wrong) < min(right)
    assert svm_accuracy(images, [str(digit) for digit in asked]) == [1.0] * 4
    assert svm_accuracy(images, [str((digit + 1) % 10) for digit in asked]) == [0.0] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real thing with a smaller model, and a third of its iterations."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    quickstart(str(folder), 42, QUICK, iterations=16, eval_steps=1000, eval_prompts=200)
    return folder


def test_rebel_makes_it_draw_what_it_is_asked_for(folder: Path) -> None:
    first, *between, last = read_rows(folder / "metrics.jsonl")
    assert first["eval/judges/svm_accuracy"] < 0.5 and last["eval/judges/svm_accuracy"] > 0.65
    assert last["eval/reward"] > first["eval/reward"] + 1.0
    assert last["samples"] == 16 * 128
    assert between[0]["kl_initial"] == 0.0 < last["kl_initial"]


def test_its_pictures_are_those_that_were_measured(folder: Path) -> None:
    """What is saved draws again, from the noise of the evaluation, what the report shows."""
    rows = [row for row in read_rows(folder / "samples.jsonl") if row["iteration"] == 16]
    images = [Image.open(folder / row["image"]) for row in rows]
    assert len(rows) == 40 and [row["prompt"] for row in rows[:11]] == [*map(str, range(10)), "0"]
    assert log_probability(images, [row["prompt"] for row in rows]) == pytest.approx([row["reward"] for row in rows])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 80 and "Held-out judges" in page


def test_the_tuned_pipeline_draws_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(folder), "--prompt", "7", "--n", "12"]) == 0
    files = [line.split("] ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert sum(svm_accuracy([Image.open(file) for file in files], ["7"] * 12)) >= 8


def test_a_folder_with_a_run_is_not_written_over(folder: Path) -> None:
    with pytest.raises(RebelError, match="holds another run: delete it, or name another folder"):
        quickstart(str(folder), 42)


def test_a_judge_is_never_the_reward(capsys: pytest.CaptureFixture[str]) -> None:
    name = "rebel.tasks.digits:svm_accuracy"
    words = ["train", "--pipeline_name_or_path", "x", "--dataset_name", "animals", "--iterations", "1"]
    assert main([*words, "--reward_funcs", name, "--judge_funcs", name]) == 2
    assert f"--judge_funcs {name} is also among --reward_funcs" in capsys.readouterr().err


def test_everything_is_seeded() -> None:
    first, second = (digits.careless_pipeline(Recipe(32, 1, steps=3), seed=7) for _ in range(2))
    weights = [torch.cat([w.flatten() for w in made.denoiser.parameters()]) for made in (first, second)]
    assert weights[0].equal(weights[1])
