"""Files and folders that are to be read: whether they are there, told before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said

DATA = (".jsonl", ".json", ".csv", ".parquet", ".txt")
"""Endings of files of rows, as `rebel.data` reads them; other names may be on the hub."""


def paths(config: RebelConfig) -> Complaints:
    """What is named by its path is there."""
    for name in ("model_name_or_path", "pipeline_name_or_path", "adapter_path"):
        value = getattr(config, name)
        if value and value.startswith((".", "/", "~")) and not Path(value).expanduser().exists():
            yield f"{said(config, name)}: there is no such folder"
    if config.dataset_name and config.dataset_name.endswith(DATA) and not Path(config.dataset_name).exists():
        yield f"{said(config, 'dataset_name')}: there is no such file"


def functions(config: RebelConfig) -> Complaints:
    """The files of functions are there."""
    for name, specs in (("reward_funcs", config.reward_funcs), ("judge_funcs", config.judge_funcs)):
        for spec in specs:
            yield from _in_file(name, spec)


def _in_file(name: str, spec: str) -> Complaints:
    """The file of file.py:function."""
    file = spec.rpartition(":")[0]
    if file.endswith(".py") and not Path(file).expanduser().is_file():
        yield f"--{name} {spec}: there is no file {file}"
