"""Where a run writes, and whether that would destroy what it reads."""

from __future__ import annotations

from pathlib import Path

from rebel.config import RebelConfig
from rebel.validate.said import Complaints, said


def folders(config: RebelConfig) -> Complaints:
    """The folder of the run, which may not hold what is read if it is to be deleted."""
    if not config.output_dir.strip():
        yield "--output_dir is empty; name a folder for the run"
    if str(config.resume_from_checkpoint).endswith((".yaml", ".yml")):
        yield f"--resume {config.resume_from_checkpoint}: checkpoints are folders; put a YAML file before --resume"
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        yield "--overwrite_output_dir would delete the checkpoint that --resume goes on from; use one of them"
    if config.overwrite_output_dir:
        for name in ("model_name_or_path", "pipeline_name_or_path", "adapter_path", "dataset_name"):
            if _inside(getattr(config, name), config.output_dir):
                yield f"--overwrite_output_dir would delete {said(config, name)}; use another --output_dir"


def _inside(path: str | None, folder: str) -> bool:
    return bool(path) and Path(path).exists() and Path(path).resolve().is_relative_to(Path(folder).resolve())


def folder_of_rollouts(config: RebelConfig) -> Complaints:
    """Rollouts have a folder to go to."""
    if not config.from_rollouts:
        yield "where to is not given: use --to for the folder of the rollouts"
