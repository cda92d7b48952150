"""Prompts: where they come from, which of them fit, and in which order an endless run takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from rebel.errors import RebelError
from rebel.seeds import seed_of
from rebel.types import Prompt

LISTS = Path(__file__).parent / "prompts"
"""Lists of prompts that come with the package, by name: animals.txt."""

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_prompts(name: str, split: str, column: str, config: str | None = None) -> list[Prompt]:
    """The prompts of one split of a hub dataset, a folder or a file; the other columns become their meta."""
    file = text_file(name)
    dataset = load_rows(str(file or name), split, config)
    if file and column not in dataset.column_names:
        dataset = dataset.rename_column("text", column).filter(lambda row: row[column].strip())
    return prompts_of(dataset, column, name)


def text_file(name: str) -> Path | None:
    """The file with one prompt a line that is meant: of that path, or of that name in the package."""
    packaged = LISTS / f"{name}.txt"
    if packaged.parent == LISTS and packaged.is_file() and not Path(name).exists():
        return packaged
    return Path(name) if Path(name).suffix == ".txt" else None


def empty_lines(name: str) -> int:
    """Lines without a prompt in a file of one prompt a line; they are skipped. 0 for any other data."""
    file = text_file(name)
    return sum(not line.strip() for line in file.read_text("utf-8").splitlines()) if file and file.is_file() else 0


def load_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """Rows of one split; errors say what was looked for."""
    path = Path(name)
    if path.suffix in FORMATS and not path.exists():
        raise RebelError(f"--dataset_name {name}: there is no such file")
    try:
        if path.is_file():
            return load_file(path)
        if (path.is_dir() and (path / "dataset_info.json").exists()) or (path / "dataset_dict.json").exists():
            found = load_from_disk(name)
            return choose_split(found, split, name) if isinstance(found, DatasetDict) else found
        return load_dataset(name, config, split=split)
    except RebelError:
        raise
    except Exception as error:  # of many kinds: files, network, parsers
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RebelError(f"--dataset_name {name}: could not read the split {split!r}: {reason}") from error


def load_file(path: Path) -> Dataset:
    if path.suffix not in FORMATS:
        raise RebelError(
            f"--dataset_name {path}: {path.suffix or 'a file without ending'} is none of {', '.join(FORMATS)}"
        )
    if not path.stat().st_size:
        raise RebelError(f"--dataset_name {path}: the file is empty")
    return load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")


def choose_split(found: DatasetDict, split: str, name: str) -> Dataset:
    if split not in found:
        raise RebelError(f"--dataset_name {name} has no split {split!r}; it has {', '.join(map(str, found))}")
    return found[split]


def prompts_of(rows: Dataset | Sequence[dict[str, Any]], column: str, name: str = "the dataset") -> list[Prompt]:
    """One prompt for each row. Errors name the first row that is empty or of the wrong type."""
    if not len(rows):
        raise RebelError(f"{name} has no rows, so there are no prompts")
    columns = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
    if column not in columns:
        raise RebelError(f"{name} has no column {column!r}; it has {', '.join(columns)}: set --prompt_column")
    every: Any = rows  # datasets says of its rows no more than that they may be mappings
    return [prompt_of(row, column, f"{name}, row {number}") for number, row in enumerate(every)]


def prompt_of(row: dict[str, Any], column: str, where: str) -> Prompt:
    content = row[column]
    if not (isinstance(content, str) or is_messages(content)):
        raise RebelError(
            f"{where}: {column} is {type(content).__name__} ({str(content)[:60]!r}); "
            "a prompt is text or a list of messages with role and content"
        )
    if not content or (isinstance(content, str) and not content.strip()):
        raise RebelError(f"{where}: {column} is empty; take the row out of the data")
    return Prompt(content, {key: value for key, value in row.items() if key != column})


def is_messages(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in content)


def that_fit(
    prompts: Sequence[Prompt], encode: Callable[[Prompt], list[int]], longest: int
) -> tuple[list[Prompt], int]:
    """The prompts of at most `longest` tokens, and how many were longer. None is ever cut."""
    kept = [prompt for prompt in prompts if len(encode(prompt)) <= longest]
    if not kept:
        raise RebelError(
            f"every one of the {len(prompts)} prompts is longer than --max_prompt_length {longest} tokens; raise it"
        )
    return kept, len(prompts) - len(kept)


@dataclass(frozen=True, slots=True)
class PromptStream:
    """The prompts in an endless order: every pass is a new permutation, known from the seed alone."""

    prompts: Sequence[Prompt]
    seed: int

    def take(self, start: int, count: int) -> list[Prompt]:
        """The prompts at the places start .. start + count - 1 of the stream."""
        return [self.prompts[k] for k in laps(len(self.prompts), self.seed, start, count)]


def laps(items: int, seed: int, start: int, count: int) -> list[int]:
    """Places start .. start + count - 1 of an endless order of 0 .. items - 1; every lap is a new permutation."""
    orders: dict[int, list[int]] = {}
    taken = []
    for place in range(start, start + count):
        lap, offset = divmod(place, items)
        if lap not in orders:
            orders[lap] = shuffled(items, seed, lap)
        taken.append(orders[lap][offset])
    return taken


def shuffled(count: int, *seeds: int) -> list[int]:
    """0 .. count - 1 in an order that depends on the seeds alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*seeds))).tolist()
