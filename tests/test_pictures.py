"""Pictures of a run: files in its folder, grids in report.html that carry them in the page, grids in trackers."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import HOSTILE, SETTINGS, Page, metrics_rows, run_folder
from transformers import TrainingArguments

from rebel.record import with_files
from rebel.report import write_report
from rebel.report.headline import remarks
from rebel.trackers import Trackers, mosaic


def picture(shade: int, size: int = 32) -> Image.Image:
    return Image.new("L", (size, size), shade)


def rows_of(iteration: int, size: int = 32, prompts: tuple[str, ...] = ("3", "7")) -> list[dict[str, Any]]:
    """An evaluation's samples, each picture of another shade."""
    return [
        {"iteration": iteration, "prompt": prompt, "image": picture(10 * iteration + k, size), "reward": k - 2.5}
        for k, prompt in enumerate(prompts)
    ]


def page_of(folder: Path, *evaluations: list[dict[str, Any]]) -> Page:
    folder.mkdir(exist_ok=True)
    rows = [row for rows in evaluations for row in with_files(rows, folder)]
    return Page(write_report(run_folder(folder, metrics_rows(), rows, SETTINGS)))


def shown(page: Page) -> list[Image.Image]:
    """The pictures that the page carries, in its order."""
    uris = [value or "" for name, value in page.attributes if name == "src"]
    assert all(uri.startswith("data:image/png;base64,") for uri in uris)
    return [Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]


def test_the_page_carries_those_of_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", rows_of(0), rows_of(4), rows_of(12))
    assert [image.getpixel((0, 0)) for image in shown(page)] == [0, 1, 120, 121]
    assert "before training" in page.text and "after iteration 12" in page.text
    titles = [value for name, value in page.attributes if name == "title"]
    assert titles == ["3: reward -2.50", "7: reward -1.50"] * 2
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in (value or ""))
    assert policy is not None and "img-src data:;" in policy
    assert {name for name, _ in page.attributes if name in ("href", "srcset", "action")} == set()


def test_one_evaluation_is_one_grid(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", rows_of(0))
    assert len(shown(page)) == 2 and "same noise" not in page.text


def test_a_run_of_text_has_no_grid(tmp_path: Path) -> None:
    rows = [{"iteration": 0, "prompt": "x", "completion": "y", "reward": 1.0}]
    page = Page(write_report(run_folder(tmp_path, metrics_rows(), rows, SETTINGS)))
    assert "img" not in page.tags and "y" in page.text


def test_large_pictures_are_kept_whole_and_shown_small(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", rows_of(0, size=512))
    assert [image.size for image in shown(page)] == [(192, 192)] * 2
    assert Image.open(tmp_path / "run" / "images" / "000000-001.png").size == (512, 512)


def test_prompts_and_judges_do_not_become_markup(tmp_path: Path) -> None:
    clean = page_of(tmp_path / "clean", rows_of(0), rows_of(12))
    hostile = page_of(tmp_path / "other", rows_of(0, prompts=(HOSTILE,) * 2), rows_of(12, prompts=(HOSTILE,) * 2))
    assert hostile.tags == clean.tags and not any(name.startswith("on") for name, _ in hostile.attributes)


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "/etc/passwd", "images/../secret.png", "secret.png", "images/text.png", "images/no.png", 3],
)
def test_only_pictures_of_the_run_get_into_the_page(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    picture(9).save(tmp_path / "secret.png")
    picture(9).save(folder / "secret.png")
    (folder / "images" / "text.png").write_text("no picture, but a secret")
    rows = [{"iteration": 0, "prompt": "x", "image": name, "reward": 1.0}]
    page = Page(write_report(run_folder(folder, metrics_rows(), rows, SETTINGS)))
    assert "img" not in page.tags


def test_a_link_out_of_the_run_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "images").mkdir(parents=True)
    picture(9).save(tmp_path / "secret.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [{"iteration": 0, "prompt": "x", "image": "images/link.png", "reward": 1.0}]
    assert "img" not in Page(write_report(run_folder(folder, metrics_rows(), rows, SETTINGS))).tags


def judged(*verdicts: float, reward: float = 0.5) -> list[dict[str, Any]]:
    return [
        {"iteration": t, "eval/reward": reward * t, "eval/judges/svm": verdict, "eval/judges/svm_stderr": 0.01}
        for t, verdict in enumerate(verdicts)
    ]


def test_a_judge_is_drawn_next_to_the_reward(tmp_path: Path) -> None:
    page = Page(write_report(run_folder(tmp_path, judged(0.5, 0.7, 0.9), [], SETTINGS)))
    assert re.search(r"Reward .* Held-out judges svm evaluation 0\.900 ± 0\.010", page.text)


def test_a_reward_that_is_exploited_is_said() -> None:
    said = "The reward rose while the held-out judge svm fell from 0.900 to 0.400"
    assert any(said in sentence for sentence in remarks(judged(0.9, 0.4), {}))
    assert not any("judge" in sentence for sentence in remarks(judged(0.4, 0.9), {}))
    assert not any("judge" in sentence for sentence in remarks(judged(0.9, 0.89), {}))
    assert not any("judge" in sentence for sentence in remarks(judged(0.9, 0.4, reward=-0.5), {}))


def test_a_mosaic_has_the_pictures_in_rows() -> None:
    whole = mosaic([picture(k, size=2) for k in range(1, 6)], columns=3)
    assert whole.shape == (4, 6, 3)
    assert whole[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert mosaic([picture(1, size=2)]).shape == (2, 2, 3)


def test_trackers_that_can_show_pictures_do(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trackers = Trackers([], arguments, None, None, None, None)
    shown: dict[str, Any] = {}
    board = SimpleNamespace(add_image=lambda *given, **more: shown.update(board=(given, more)))
    wandb = SimpleNamespace(run=1, Image=lambda image: image, log=lambda row: shown.update(wandb=row))
    trackers.handler.callbacks += [SimpleNamespace(tb_writer=board), SimpleNamespace(_wandb=wandb), object()]
    trackers.state.global_step = 40
    trackers.pictures([])
    assert not shown
    images = [picture(1), picture(2)]
    trackers.pictures(images)
    (name, array, step), more = shown["board"]
    assert (name, step, more) == ("eval/images", 40, {"dataformats": "HWC"}) and np.array_equal(array, mosaic(images))
    assert shown["wandb"] == {"eval/images": images, "train/global_step": 40}
