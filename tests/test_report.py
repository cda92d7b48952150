"""Rows on disk, the table of the terminal, and report.html of whole, broken and hostile runs."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from rebel.report import Terminal, append_rows, read_rows, truncate_after, write_report
from rebel.report.chart import HEIGHT, WIDTH, Point, Series, axis, plot
from rebel.report.figures import sections
from rebel.report.headline import remarks
from rebel.report.page import compared, visible
from rebel.report.words import duration, number, share

ITERATIONS = 12
SETTINGS = {
    "model_name_or_path": "tiny",
    "reward_funcs": ["rewards.py:happy", "rewards.py:short"],
    "eta": "auto",
    "kl_per_iteration": 0.3,
    "beta": 0.05,
    "iterations": ITERATIONS,
    "num_generations": 8,
    "prompts_per_iteration": 32,
}
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)></textarea><!-- ]]>"
    "\"'><svg onload=alert(3)> {{ 7 * 7 }} {% raw %} &lt;b&gt; \x00\x1b[31m\u202egnp.exe \ud800 \u2028 end"
)


def training(iteration: int) -> dict:
    """The metrics of an iteration of a run that goes well."""
    done = iteration / ITERATIONS
    return {
        "reward": 0.4 + 0.4 * done,
        "reward_std": 0.3,
        "rewards/happy": 0.5 + 0.4 * done,
        "rewards/short": -0.1,
        "kl_initial": 5 * done,
        "kl_iteration": 0.3 + 0.01 * (iteration % 3),
        "r2_in_sample": 0.4,
        "r2_held_out": 0.2,
        "flat_groups": 0.1 * done,
        "length": 40 + iteration,
        "length_reward_correlation": 0.1,
        "unfinished": 0.1,
        "entropy": 2 - done,
        "logratio_best": -0.1 * done,
        "logratio_worst": -0.5 * done,
        "loss": 0.2,
        "grad_norm": 1.5,
        "eta": 5 + iteration,
        "tokens_per_second_sampling": 5000.0,
        "seconds/sampling": 3.0,
        "seconds/training": 6.0,
        "seconds/total": 9.0,
    }


def evaluation(iteration: int) -> dict:
    done = iteration / ITERATIONS
    return {
        "eval/reward": 0.412 + 0.4 * done,
        "eval/reward_stderr": 0.02,
        "eval/kl_initial": 5 * done,
        "eval/length": 41.0,
        "eval/unfinished": 0.1,
    }


def metrics_rows() -> list[dict]:
    rows = []
    for t in range(ITERATIONS + 1):
        row = {"iteration": t, "step": 8 * t, "samples": 256 * t}
        rows.append(row | (training(t) if t else {}) | (evaluation(t) if t % 4 == 0 else {}))
    return rows


def sample_rows() -> list[dict]:
    return [
        {"iteration": t, "prompt": f"prompt {k}", "completion": f"answer {k} at {t}", "reward": t / 100 + k / 1000}
        for t in (0, 4, ITERATIONS)
        for k in range(5)
    ]


def run_folder(folder: Path, metrics: list[dict], samples: list[dict], settings: dict | None) -> Path:
    append_rows(folder / "metrics.jsonl", metrics)
    append_rows(folder / "samples.jsonl", samples)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


class Page(HTMLParser):
    """What a browser would see of a page: its tags, its attributes and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.pieces: dict[str, list[str]] = {}
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        where = self.tags[-1] if self.tags and self.tags[-1] in ("script", "style") else "text"
        self.pieces.setdefault(where, []).append(data)

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("/" + tag)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces["text"]).split())


def page_of(folder: Path, metrics: list[dict], samples: list[dict], settings: dict | None) -> Page:
    return Page(write_report(run_folder(folder, metrics, samples, settings)))


# -- rows ----------------------------------------------------------------------------------------------------


def test_rows_come_back_and_hold_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"a": 1, "b": math.nan, "c": [math.inf, 2.5]}])
    append_rows(path, [{"a": np.float32("nan"), "b": np.int64(3), "c": "\ud800 é"}, {"a": -math.inf}])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_rows(path) == [{"a": 1, "b": None, "c": [None, 2.5]}, {"a": None, "b": 3, "c": "\ud800 é"}, {"a": None}]


def test_an_unfinished_last_line_is_skipped_and_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"iteration": 1}])
    with path.open("ab") as file:
        file.write(b'{"iteration": 2, "rew\xc3')
    assert read_rows(path) == [{"iteration": 1}]
    append_rows(path, [{"iteration": 3}])
    assert read_rows(path) == [{"iteration": 1}, {"iteration": 3}]


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    truncate_after(path, 3)
    assert not path.exists()
    append_rows(path, [{"iteration": t, "part": k} for t in range(6) for k in range(2)])
    with path.open("ab") as file:
        file.write(b'{"iteration": 1')
    truncate_after(path, 3)
    assert [row["iteration"] for row in read_rows(path)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert path.read_bytes().endswith(b"}\n")
    truncate_after(path, -1)
    assert read_rows(path) == []
    assert list(tmp_path.iterdir()) == [path]


# -- the terminal --------------------------------------------------------------------------------------------


def console(**how: object) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, **how), out  # type: ignore[arg-type]


def test_the_table_is_plain_narrow_and_repeats_its_header() -> None:
    screen, out = console()
    terminal = Terminal(ITERATIONS * 4, console=screen)
    for t in range(4):
        for row in metrics_rows():
            if row["iteration"] or not t:
                terminal.row(row | {"iteration": row["iteration"] + t * ITERATIONS})
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert max(map(len, lines)) <= 100
    headers = [place for place, line in enumerate(lines) if "KL init" in line]
    assert len(headers) == 4 and all(b - a <= 26 for a, b in pairwise(headers))
    assert len({len(lines[place]) for place in headers}) == 1
    before, first = lines[2].split(), lines[3].split()
    assert before == ["eval", "0.412", "0.020", "0.000", "41.0", "10%"]
    assert first[:5] == ["1/48", "256", "0.433", "0.300", "0.417"]


def test_missing_values_leave_the_columns_where_they_are() -> None:
    screen, out = console()
    terminal = Terminal(None, console=screen)
    terminal.row({"iteration": 1, "reward": 0.5, "length": 7.0})
    terminal.row({"iteration": 2, "reward": 0.6, "kl_initial": math.nan, "length": 8.0})
    header, *rows = out.getvalue().splitlines()[1:]
    for row in rows:
        assert row[: header.index("length") + len("length")].split()[-1] in ("7.00", "8.00")
        assert "nan" not in row


def test_time_left_is_that_of_the_iterations_that_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rebel.report.terminal.time.monotonic", lambda: now[0])
    screen, out = console()
    terminal = Terminal(10, console=screen)
    terminal.row({"iteration": 4, "reward": 0.0, "seconds/total": 60.0})
    now[0] = 40.0
    terminal.row({"iteration": 6, "reward": 0.0, "seconds/total": 60.0})
    first, second = out.getvalue().splitlines()[2:]
    assert first.endswith("6m 00s") and second.endswith("1m 20s")


def test_the_bar_shows_tokens_per_second_and_leaves_the_rows_whole() -> None:
    screen, out = console(force_terminal=True, width=100)
    terminal = Terminal(3, console=screen)
    with terminal.phase("sampling", 10) as advance:
        advance(5, tokens=1000, reward=0.25)
        terminal.row({"iteration": 1, "reward": 0.123456})
        time.sleep(0.25)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"sampling .* 5/10 .* [\d,]+ tok/s  reward 0.250", shown)
    rows = [line for line in re.split(r"[\r\n]+", shown) if "0.123" in line]
    assert len(rows) == 1 and rows[0].split()[:2] == ["1/3", "-"]


def test_bars_can_be_left_out_and_other_processes_are_silent() -> None:
    for how, expected in (({"disable": True}, "0.500"), ({"silent": True}, "")):
        screen, out = console(force_terminal=True, width=100, quiet="silent" in how)
        terminal = Terminal(3, console=screen, **how)
        with terminal.phase("sampling", 10) as advance:
            advance(5, tokens=10)
            time.sleep(0.15)
        terminal.row({"iteration": 1, "reward": 0.5})
        assert "sampling" not in out.getvalue() and expected in out.getvalue()
        assert bool(out.getvalue()) is bool(expected)


def test_an_ascii_output_is_no_reason_to_end_a_run() -> None:
    raw = io.BytesIO()
    screen = Console(file=io.TextIOWrapper(raw, encoding="ascii"))
    terminal = Terminal(3, console=screen)
    terminal.row({"iteration": 1, "reward": 0.5})
    screen.file.flush()
    assert b"0.500" in raw.getvalue()


def test_the_report_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import rebel.report, sys; assert 'torch' not in sys.modules"], check=True)


# -- words and plots -----------------------------------------------------------------------------------------


def test_numbers_read_as_people_write_them() -> None:
    assert [number(v) for v in (0.0, 0.12345, -1.2345, 12.345, 1234.5, 2e7, 1e-5, None)] == [
        *("0.000", "0.123", "-1.23", "12.3", "1,234", "2.0e+07", "1.0e-05", "–")
    ]
    assert [share(v) for v in (0.0, 0.034, 0.5, 1.0, None)] == ["0%", "3.4%", "50%", "100%", "–"]
    times = [duration(seconds) for seconds in (0.31, 59.7, 90.0, 3725.0, 200_000.0)]
    assert times == [
        "0.3 s",
        "1m 00s",
        "1m 30s",
        "1h 02m",
        "2d 7h",
    ]


@pytest.mark.parametrize(
    "values",
    [[0.0], [1e16], [0.1, 0.97], [-0.25, 1.0], [3.0, 3.0000000001], [-1e-9, 1e-9], [0.0, 1e90], [4.0, 40.0]],
)
def test_an_axis_holds_its_values_and_its_labels_differ(values: list[float]) -> None:
    scale = axis(values)
    assert scale.low <= min(values) and max(values) <= scale.high
    assert 2 <= len(scale.ticks) <= 9
    labels = [scale.label(tick) for tick in scale.ticks]
    assert len(set(labels)) == len(labels)
    for label, tick in zip(labels, scale.ticks, strict=True):
        assert float(label.replace(",", "")) == pytest.approx(tick, rel=0.06, abs=1e-12)


def coordinates(points: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in points.split()]  # type: ignore[misc]


def test_a_plot_puts_higher_values_higher_and_later_ones_further_right() -> None:
    drawn = plot("", [Series("a", tuple(Point(float(t), v) for t, v in enumerate([0.0, 0.5, 0.2])))])
    assert drawn is not None
    (x0, y0), (x1, y1), (x2, y2) = coordinates(drawn.series[0].line)
    assert x0 < x1 < x2 and y1 < y2 < y0
    assert plot("", [Series("a", ())]) is None


def test_one_absurd_value_neither_flattens_a_plot_nor_leaves_its_frame() -> None:
    values = [0.1 * t for t in range(20)]
    values[7] = 1e6
    drawn = plot("", [Series("a", tuple(Point(float(t), v) for t, v in enumerate(values)))])
    assert drawn is not None
    places = coordinates(drawn.series[0].line)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert places[0][1] - places[19][1] > HEIGHT / 2
    assert "1 value lies beyond the frame" in drawn.remark


def test_a_long_run_is_smoothed_and_thinned() -> None:
    values = [(t % 2) - 0.5 for t in range(5000)]
    drawn = plot("", [Series("a", tuple(Point(float(t), v) for t, v in enumerate(values)))])
    assert drawn is not None and "Bold" in drawn.remark
    line = coordinates(drawn.series[0].line)
    assert len(line) <= 500
    assert len({round(y) for _, y in line[50:]}) == 1


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_tells_the_whole_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics_rows(), sample_rows(), SETTINGS)
    for words in ("0.412 ± 0.020 → 0.812 ± 0.020", "change +0.400 ± 0.028", "3,072", "1m 48s", "12 iterations"):
        assert words in page.text
    for title in ("Reward", "Reward against KL", "KL of each iteration", "Fit of the regression", "Flat groups"):
        assert title in page.text
    assert "Both may fall, and that is normal" in page.text
    assert page.tags.count("svg") == 14
    assert "answer 4 at 0" in page.text and "answer 4 at 12" in page.text and "at 4 " not in page.text
    assert "+0.120" in page.text
    assert "kl_per_iteration" in page.text and "Stopped" not in page.text


@pytest.mark.parametrize(
    ("heat", "words"), [(0, "Evaluations are greedy"), (0.5, "temperature 0.5"), (1.0, ""), (None, "")]
)
def test_another_temperature_of_evaluations_is_said(heat: float | None, words: str) -> None:
    rows = [{"iteration": k, "reward": 0.5, "eval/reward": 0.4, "samples": k} for k in range(3)]
    figure = sections(rows, {"temperature": 1.0, "eval_temperature": heat})[0][1][0]
    assert words in figure.note and ("another reward" in figure.note) == bool(words)


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics_rows(), sample_rows(), SETTINGS)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page.raw)


def test_only_the_script_of_the_page_may_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, metrics_rows(), sample_rows(), SETTINGS)
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in (value or ""))
    own = base64.b64encode(hashlib.sha256("".join(page.pieces["script"]).encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{own}'" in policy and "default-src 'none'" in policy


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    (tmp_path / "<b>").mkdir()
    clean = page_of(tmp_path / "clean", metrics_rows(), sample_rows(), SETTINGS | {"other": "x"})
    metrics = [{k.replace("happy", HOSTILE): v for k, v in row.items()} for row in metrics_rows()]
    samples = [row | {"prompt": row["prompt"] + HOSTILE, "completion": HOSTILE * 500} for row in sample_rows()]
    settings = {**SETTINGS, "model_name_or_path": "<i>m</i>", "reward_funcs": ["</b><script>x"], "other": "<u>" * 900}
    hostile = page_of(tmp_path / "<b>", metrics, samples, settings)
    assert hostile.tags == clean.tags
    assert not any(name.startswith("on") for name, _ in hostile.attributes)
    assert " ".join(visible(HOSTILE).split()) in hostile.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u2028\ud800-\udfff]", hostile.raw)
    assert "\\u202egnp" in hostile.text and "\\ud800" in hostile.text and "{{ 7 * 7 }}" in hostile.text
    assert "more characters" in hostile.text and len(hostile.raw) < 1_000_000


def test_text_in_other_scripts_stays_as_it_is() -> None:
    for text in ("مرحبا", "שלום", "日本語", "👩‍👩‍👧 é", "a\n\tb"):
        assert visible(text) == text
    assert visible("a\r\nb\rc\x7f\x9b") == "a\nb\\x0dc\\x7f\\x9b"


@pytest.mark.parametrize("kept", range(4))
def test_an_interrupted_run_still_has_a_page(tmp_path: Path, kept: int) -> None:
    page = page_of(tmp_path, metrics_rows()[:kept], sample_rows()[: 5 * (kept > 0)], SETTINGS)
    said = f"{kept - 1} of 12 iterations are done" if kept else "Nothing has been measured yet"
    assert said in page.text and "nan" not in page.text
    assert page.tags.count("svg") == page.tags.count("/svg")
    if kept:
        assert f"KL to the initial policy {number(5.0 * (kept - 1) / ITERATIONS)} nats" in page.text
        assert "before training" in page.text and "not drawn" not in page.text


def test_a_folder_with_nothing_in_it_still_has_a_page(tmp_path: Path) -> None:
    assert "Nothing has been measured yet" in Page(write_report(tmp_path)).text


def test_unreadable_and_missing_parts_leave_the_rest(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("eta: [1, \n")
    bare = [{"iteration": t, "reward": 0.1 * t, "kl_initial": None, "r2_held_out": "x", "loss": 1e300} for t in (1, 2)]
    append_rows(tmp_path / "metrics.jsonl", bare)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "reward": NaN}\n{"iteration": 4, "rew')
    page = Page(write_report(tmp_path))
    assert "Reward in training 0.100 → 0.200 no evaluation was made" in page.text
    assert page.tags.count("svg") == 1 and "nan" not in page.text


def test_what_stands_out_is_said_and_nothing_else() -> None:
    assert remarks(metrics_rows(), SETTINGS) == []

    def said(change: dict, settings: dict = SETTINGS) -> str:
        return " ".join(remarks([row | change if row["iteration"] else row for row in metrics_rows()], settings))

    assert "may be chance" in said({"eval/reward": 0.43, "eval/reward_stderr": 0.02})
    assert "named another winner in 30% of the latest comparisons" in said({"judge/contradictions": 0.3})
    assert "another winner" not in said({"judge/contradictions": 0.02})
    assert "fell" in said({"eval/reward": 0.2, "eval/reward_stderr": 0.02})
    assert "memorises" in said({"r2_in_sample": 0.6, "r2_held_out": -0.1})
    assert "all rewards are equal" in said({"flat_groups": 0.7})
    assert "cut off" in said({"unfinished": 0.4})
    assert "go together" in said({"length_reward_correlation": -0.8})
    assert "the goal is 0.300" in said({"kl_iteration": 1.2})
    assert said({"kl_iteration": 1.2}, SETTINGS | {"eta": 5.0}) == ""
    assert "24 completions and 12 whole groups" in said({"dropped_completions": 2, "dropped_groups": 1})


def test_completions_are_paired_by_prompt_whatever_their_order() -> None:
    rows = [
        {"iteration": 0, "prompt": "p", "completion": "p0", "reward": 1.0},
        {"iteration": 0, "prompt": "q", "completion": "q0", "reward": None},
        {"iteration": 5, "prompt": "p", "completion": "between", "reward": 0.0},
        {"iteration": 9, "prompt": "q", "completion": "q9", "reward": 2.0},
        {"iteration": 9, "prompt": "p", "completion": "p9", "reward": 4.0},
        {"iteration": 9, "prompt": "p", "completion": "p9 again", "reward": 5.0},
    ]
    pairs, first, last = compared(rows)
    found = [(p.prompt, p.before and p.before.text, p.after and p.after.text, p.change) for p in pairs]
    assert found == [("p", "p0", "p9", 3.0), ("p", None, "p9 again", None), ("q", "q0", "q9", None)]
    assert (first, last) == (0, 9)
    assert compared(rows[:2])[2] is None


@pytest.mark.parametrize(
    ("title", "key", "settings"),
    [
        ("Order of held-out pairs", "eval/accuracy", {"offline": True}),
        ("Win rate", "eval/win_rate", {"eval_against": "initial"}),
    ],
)
def test_what_a_reward_noted_is_no_measure_of_ours(title: str, key: str, settings: dict) -> None:
    rows = [{"iteration": t, "eval/reward": 0.1 * t, key: 0.5 + 0.1 * t} for t in range(3)]

    def shown(settings: dict) -> bool:
        return title in [figure.title for _, figures in sections(rows, settings) for figure in figures]

    assert shown(settings) and not shown({"offline": False, "eval_against": None})
