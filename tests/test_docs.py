"""The documentation is true where it can be checked: code runs, excerpts, names and defaults are those of the code."""

from __future__ import annotations

import ast
import json
import math
import re
import symtable
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from trl.trainer.grpo_config import GRPOConfig

import rebel
from rebel.cli import parse
from rebel.config import RebelConfig
from rebel.elsewhere import explanation
from rebel.settings import known

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^```(\w*) ?([\w.]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OURS = {field.name: field for field in fields(RebelConfig)}
THEIRS = {field.name: field for field in fields(GRPOConfig)}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def blocks(text: str, mark: str) -> list[str]:
    """Code blocks opened by ```python and this word."""
    return [code for language, word, code in FENCE.findall(text) if (language, word) == ("python", mark)]


def named_in(code: str) -> set[str]:
    """What a block defines, imports or assigns at its top level; the name of a caught error is gone after it."""
    symbols = symtable.symtable(code, "page", "exec").get_symbols()
    caught = {node.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ExceptHandler)}
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()} - caught


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_pages_are_found() -> None:
    assert {"method.md", "report.md", "rewards.md", "parts.md", "from-trl.md", "choosing.md"} <= {p.name for p in PAGES}
    assert sum(len(blocks(path.read_text(), "run")) for path in PAGES) >= 10


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path.read_text(), "run")], ids=ids)
def test_code_of_a_page_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rebel-run").mkdir()
    row = {"iteration": 0, "samples": 0, "eval/reward": 0.5, "eval/kl_initial": 0.0}
    (tmp_path / "rebel-run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    module = ModuleType(f"page_{path.stem}")  # dataclasses look theirs up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code in blocks(path.read_text(), "run"):
        exec(compile(code, str(path), "exec"), vars(module))
        assert named_in(code) <= vars(module).keys(), "the block came to its last line"


def test_excerpts_are_in_the_file_they_are_from() -> None:
    excerpts = blocks(page("method.md"), "algorithm.py")
    assert len(excerpts) >= 5
    source = (ROOT / "src" / "rebel" / "algorithm.py").read_text()
    for excerpt in excerpts:
        assert excerpt in source


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), f"{target} in {path.name}"
        if heading:
            assert heading in headings(found.read_text()), f"{target} in {path.name}"


def headings(text: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_flags_that_are_named_exist(path: Path) -> None:
    flags = set(re.findall(r"(?<![\w-])--([a-z]\w*(?:[-_]\w+)*)", path.read_text()))
    unknown = {flag.replace("-", "_") for flag in flags} - set(known()) - options()
    assert not unknown


def options() -> set[str]:
    """Flags of the commands that are no settings, and those of other tools that the pages name."""
    commands = (["train"], ["rollout"], ["score", "ROLLOUTS"], ["sample", "RUN", "--prompt", "x"], ["quickstart"])
    commands = (*commands, ["sft"], ["reward-model"], ["evaluate", "RUN", "--judge", "x"])
    ours = {name for words in commands for name in parse(words).options}
    of_vllm = {"host", "port", "model", "dtype", "enforce_eager", "load_format", "served_model_name"}
    return ours | {"help", "version"} | of_vllm


# -- coming from TRL -----------------------------------------------------------------------------------------------


def tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """(heading, cells) of each row of the tables of a page, without backquotes."""
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| ") and "---" not in line:
            yield heading, [cell.strip() for cell in line.strip("| ").split(" | ")]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def default(field: Field) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]


def test_settings_that_keep_their_meaning_are_settings_of_both() -> None:
    same = names_in(page("from-trl.md").partition("<!-- same -->")[2].partition("<!-- end -->")[0])
    other = [
        name
        for heading, cells in tables(page("from-trl.md"))
        if heading == "Settings with another meaning"
        for name in names_in(cells[0])
    ]
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size")
    assert {*same, *other, *batch, "steps_per_generation"} == set(OURS) & set(THEIRS)


def test_defaults_that_differ_are_as_the_page_says() -> None:
    rows = [
        cells
        for heading, cells in tables(page("from-trl.md"))
        if heading == "Settings with the same meaning" and names_in(cells[0])
    ]
    assert len(rows) >= 5
    for name, ours, theirs in rows:
        (name,) = names_in(name)
        assert (str(default(OURS[name])), str(default(THEIRS[name]))) == (ours, theirs), name


def test_settings_without_a_meaning_are_trls_and_are_explained() -> None:
    rows = [cells for heading, cells in tables(page("from-trl.md")) if heading.startswith("Settings without")]
    names = [name for cells in rows for name in names_in(cells[0])]
    assert len(names) > 15
    for name in names:
        assert name in THEIRS and name not in OURS and explanation(name), name


def test_the_example_for_users_of_trl_is_the_same_but_for_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = blocks(page("from-trl.md"), "")[:1]
    (after,) = blocks(page("from-trl.md"), "rebel")
    swapped = before.replace("trl import GRPOConfig, GRPOTrainer", "rebel import RebelConfig, RebelTrainer")
    assert swapped.replace("GRPO", "Rebel") == after

    tiny.model(max_position_embeddings=1024).save_pretrained(tmp_path / "chat")
    tiny.tokenizer(chat=True).save_pretrained(tmp_path / "chat")
    rows = [{"prompt": [{"role": "user", "content": f"w{k}"}]} for k in range(4)]
    trained = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    monkeypatch.setattr(rebel.RebelTrainer, "train", lambda trainer: trained.append(trainer))
    monkeypatch.chdir(tmp_path)
    small = after.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "chat"))
    exec(small.replace("bf16=True", "bf16=True, use_cpu=True"), {"__name__": "after"})
    assert trained[0].job.iterations == math.ceil(400 / (8 * 4))


def test_what_a_reward_function_is_called_with_is_documented() -> None:
    from rebel.rewards.functions import PASSED

    assert all(f"`{name}`" in page("rewards.md") for name in PASSED)
