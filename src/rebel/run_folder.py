"""The folder of a run: what lies in it, who may write into it, and where a resumed run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from rebel import checkpoint
from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.iterates import FOLDER as ITERATES
from rebel.report import read_rows
from rebel.samplers.server import PREFIX as SENT

METRICS, SAMPLES, SETTINGS, FAILED = "metrics.jsonl", "samples.jsonl", "config.yaml", "failed_reward.json"
BEST, ROUNDS, IMAGES = "best", "rounds", "images"
OPPONENTS = "eval_opponents.jsonl"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
MODEL = ("config.json", "adapter_config.json", "model_index.json", *WEIGHTS)
"""Files by which a saved model is known, whoever made it."""
JUDGED = "opponents.jsonl"
LEFTOVERS = (METRICS, SAMPLES, SETTINGS, FAILED, "report.html", JUDGED)


def claim_folder(config: RebelConfig, resume: bool) -> Path:
    """The output folder, made if need be, without what another run has left there if that may go."""
    folder = check_folder(config, resume)
    if not resume:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(config: RebelConfig, resume: bool) -> Path:
    """The output folder. One that holds another run is an error unless it is to be overwritten."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RebelError(f"--output_dir {folder} is a file; name a folder")
    model = config.model_name_or_path or config.pipeline_name_or_path
    if model and folder.resolve() == Path(model).resolve():
        raise RebelError(f"--output_dir {folder} is the model's own folder; the tuned model would replace it")
    held = [name for name in (*LEFTOVERS, ROUNDS) if (folder / name).exists()] + checkpoint.all_checkpoints(folder)
    if held and not resume and not config.overwrite_output_dir and learnt(folder):
        raise RebelError(
            f"--output_dir {folder} holds another run: go on with it by --resume, replace it by "
            "--overwrite_output_dir, or name another folder"
        )
    model = [name for name in MODEL if (folder / name).exists()]
    if model and not held:
        raise RebelError(f"--output_dir {folder} holds a model that is not of `rebel train` ({model[0]}); name another")
    return folder


def learnt(folder: Path) -> bool:
    """Whether a run got beyond its first evaluation, or left anything else that took time to make."""
    costly = [name for name in (*MODEL, ROUNDS, JUDGED) if (folder / name).exists()]
    rows = read_rows(folder / METRICS) if (folder / METRICS).exists() else []
    steps = [found.name for found in checkpoint.all_checkpoints(folder) if found.name != f"{checkpoint.PREFIX}0"]
    return bool(costly or steps) or any(row["iteration"] for row in rows)


def clear(folder: Path) -> None:
    """Delete what a run of rebel left, and nothing else."""
    for name in (*LEFTOVERS, OPPONENTS, *MODEL):
        (folder / name).unlink(missing_ok=True)
    weights = folder.glob(f"{SENT}*")
    kept = [folder / name for name in (BEST, ITERATES, ROUNDS, IMAGES)]
    for old in [*checkpoint.all_checkpoints(folder), *kept, *weights]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoint_to_resume(config: RebelConfig) -> Path | None:
    """The checkpoint that --resume names: a folder, or the latest one of the output folder."""
    asked = config.resume_from_checkpoint
    if not asked:
        return None
    if asked is not True and str(asked).lower() not in ("true", "latest"):
        if not Path(str(asked)).is_dir():
            raise RebelError(f"--resume {asked}: there is no such folder")
        return Path(str(asked))
    found = checkpoint.all_checkpoints(Path(config.output_dir))
    if not found:
        raise RebelError(f"--resume: --output_dir {config.output_dir} has no checkpoint to go on from")
    return found[-1]
