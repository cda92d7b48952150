"""Rows of a run on disk, one JSON object a line: metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rebel.report.words import finite

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a .jsonl file in one write, so that a kill leaves at most one unfinished last line."""
    text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        file.write((_line_end_missing(file) + text).encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a .jsonl file; a line that a killed process left unfinished is skipped."""
    if not path.exists():
        return []
    rows = (_parse(line) for line in path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


def truncate_after(path: Path, iteration: int) -> None:
    """Cut off the rows of later iterations, so that a resumed run does not report them twice."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if (finite(row.get("iteration")) or 0) <= iteration]
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(b"")
    append_rows(fresh, kept)
    os.replace(fresh, path)


def _line_end_missing(file: BinaryIO) -> str:
    """What has to come first where a former process left its last line unfinished."""
    if not file.seek(0, os.SEEK_END):
        return ""
    file.seek(-1, os.SEEK_END)
    return "" if file.read(1) == b"\n" else "\n"


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity become null, scalars of numpy and torch become numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
