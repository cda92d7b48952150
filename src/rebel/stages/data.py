"""Rows of a dataset -> the columns that TRL's trainers read; what cannot be used is counted, or an error by name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from rebel.data import is_messages, load_rows
from rebel.errors import RebelError
from rebel.stages.settings import PreferenceData, SftData, StageData

PASSED_ON = ("tools", "chat_template_kwargs")
"""Columns that TRL hands to the chat template."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to train on and to evaluate on, and how many were left out for which reason."""

    train: Dataset
    evaluation: Dataset | None
    left_out: Counter[str]

    @property
    def chat(self) -> bool:
        return any(isinstance(cell, list) for cell in self.train[0].values())

    def __str__(self) -> str:
        said = [f"{len(self.train):,} rows to train on"]
        said += [f"{len(self.evaluation):,} to evaluate on"] if self.evaluation is not None else []
        said += [f"left out: {count:,} {reason}" for reason, count in self.left_out.items()]
        return "; ".join(said)


def load_stage(data: StageData, text_field: str) -> Rows:
    """The rows that the settings name, in TRL's columns."""
    name = str(data.dataset_name)
    train = load_rows(name, data.dataset_train_split, data.dataset_config)
    held_out = None
    if data.dataset_test_split:
        held_out = load_rows(name, data.dataset_test_split, data.dataset_config)
    elif data.eval_rows:
        if not 0 < data.eval_rows < len(train):
            raise RebelError(f"--eval_rows {data.eval_rows} of {len(train)} rows: use a number between 1 and that")
        edge = len(train) - data.eval_rows
        train, held_out = train.select(range(edge)), train.select(range(edge, len(train)))
    left_out: Counter[str] = Counter()
    parts = [part and usable(part, data, text_field, left_out) for part in (train, held_out)]
    assert parts[0] is not None
    return Rows(parts[0], parts[1], left_out)


def usable(rows: Dataset, data: StageData, text_field: str, left_out: Counter[str]) -> Dataset:
    """The rows that can be trained on; adds to `left_out` what cannot."""
    if not len(rows):
        raise RebelError(f"--dataset_name {data.dataset_name} has no rows")
    if isinstance(data, PreferenceData):
        made = preferences(rows, data, left_out)
    else:
        assert isinstance(data, SftData)
        made = demonstrations(rows, data, text_field, left_out)
    kept = list(made)
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise RebelError(f"--dataset_name {data.dataset_name}: none of its {len(rows)} rows can be used: {reasons}")
    return Dataset.from_list(kept)


# -- SFT -----------------------------------------------------------------------------------------------------------


def demonstrations(rows: Dataset, data: SftData, text_field: str, left_out: Counter[str]) -> Iterator[dict]:
    """Rows of prompt and completion, of messages, or of text: the first of these forms that the dataset has."""
    forms = {
        (data.prompt_column, data.completion_column): ("prompt", "completion"),
        ("messages",): ("messages",),
        (text_field,): (text_field,),
    }
    here = next((form for form in forms if set(form) <= set(rows.column_names)), None)
    if here is None:
        raise RebelError(
            f"--dataset_name {data.dataset_name} has none of the columns {data.prompt_column} with "
            f"{data.completion_column}, messages, or {text_field}; it has {', '.join(rows.column_names)}: name them by "
            "--prompt_column and --completion_column, or --dataset_text_field"
        )
    every: Any = rows  # datasets says of its rows no more than that they may be mappings
    for number, row in enumerate(every):
        cells = [cell(row[column]) for column in here]
        if not all(cells):
            left_out[f"without text or messages in {' or '.join(here)}"] += 1
            continue
        same_kind(cells, here, data, number)
        yield dict(zip(forms[here], cells, strict=True)) | passed_on(row)


# -- preferences ---------------------------------------------------------------------------------------------------


def preferences(rows: Dataset, data: PreferenceData, left_out: Counter[str]) -> Iterator[dict]:
    """Rows of chosen and rejected, with the prompt where the dataset has one."""
    wanted = check_columns(rows, data)
    judged = verdicts(rows, data)
    keep_margin = data.preference_column is None and "margin" in rows.column_names
    every: Any = rows
    for number, (row, verdict) in enumerate(zip(every, judged, strict=True)):
        first, second, *prompt = cells = [cell(row[column]) for column in wanted]
        if verdict == 0:
            left_out["without a winner"] += 1
        elif not all(cells):
            left_out[f"without text or messages in {' or '.join(wanted)}"] += 1
        elif first == second:
            left_out[f"with {wanted[0]} equal to {wanted[1]}"] += 1
        else:
            same_kind(cells, wanted, data, number)
            chosen, rejected = (first, second) if verdict > 0 else (second, first)
            made = {"chosen": chosen, "rejected": rejected, **({"prompt": prompt[0]} if prompt else {})}
            yield made | ({"margin": margin(row, data, number)} if keep_margin else {}) | passed_on(row)


def check_columns(rows: Dataset, data: PreferenceData) -> list[str]:
    """The columns of the pair, and that of the prompt if there is one."""
    if len(data.pair_columns) != 2 or len(set(data.pair_columns)) != 2:
        raise RebelError(f"--pair_columns {' '.join(data.pair_columns)}: give two columns")
    prompt = [data.prompt_column] if data.prompt_column != "prompt" or "prompt" in rows.column_names else []
    wanted = [*data.pair_columns, *prompt]
    asked = [*wanted, *([data.preference_column] if data.preference_column else [])]
    missing = [column for column in asked if column not in rows.column_names]
    if missing:
        raise RebelError(
            f"--dataset_name {data.dataset_name} has no column {', '.join(missing)}; it has "
            f"{', '.join(rows.column_names)}: name the two completions by --pair_columns, the prompt by "
            "--prompt_column and, where a column says which is better, that one by --preference_column"
        )
    return wanted


def verdicts(rows: Dataset, data: PreferenceData) -> list[float]:
    """Above 0 where the first of the pair is better, below where the second is, 0 without a winner."""
    if data.preference_column is None:
        return [1.0] * len(rows)
    column, tie = data.preference_column, data.preference_tie
    numbers = [number_in(value, column, data, row) for row, value in enumerate(rows[column])]
    if tie == 0.5 and not all(0 <= number <= 1 for number in numbers):
        raise RebelError(
            f"--preference_column {column} goes from {min(numbers):g} to {max(numbers):g} and is no probability; "
            "for a margin use --preference_tie 0"
        )
    if tie == 0 and min(numbers) >= 0:
        raise RebelError(
            f"--preference_column {column} is never below --preference_tie 0, as if the first were always better; "
            "for a probability use --preference_tie 0.5; if it is always better, leave --preference_column out"
        )
    return [number - tie for number in numbers]


def number_in(value: Any, column: str, data: StageData, row: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RebelError(f"--dataset_name {data.dataset_name}, row {row}: {column} is {value!r}; a number is expected")
    return float(value)


def margin(row: dict[str, Any], data: StageData, number: int) -> float:
    """TRL asks of the model that the chosen one is better by this much."""
    value = number_in(row["margin"], "margin", data, number)
    if value < 0:
        raise RebelError(
            f"--dataset_name {data.dataset_name}, row {number}: margin is {value:g}, and the chosen completion is "
            "to be better by it. If the sign says which is better, give --preference_column margin --preference_tie 0"
        )
    return value


# -- both ----------------------------------------------------------------------------------------------------------


def cell(value: Any) -> Any:
    """Text or messages; None where there is none, nothing in it, or a value of another kind."""
    if isinstance(value, str):
        return value if value.strip() else None
    return value if value and is_messages(value) else None


def same_kind(cells: Sequence[Any], columns: Sequence[str], data: StageData, number: int) -> None:
    if len({type(value) for value in cells}) > 1:
        kinds = ", ".join(
            f"{column} is {'text' if isinstance(value, str) else 'messages'}"
            for column, value in zip(columns, cells, strict=True)
        )
        raise RebelError(f"--dataset_name {data.dataset_name}, row {number}: {kinds}; all have to be of one kind")


def passed_on(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in PASSED_ON if row.get(name) is not None}
