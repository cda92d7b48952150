"""Judges by name: a function, a table, a model in this process, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rebel.errors import RebelError
from rebel.rewards.functions import Notes
from rebel.rewards.judge_models import model_judge
from rebel.rewards.judge_text import FORCED, TEMPLATE, template_of
from rebel.rewards.judges import FunctionJudge, table_of_file
from rebel.rewards.load import function_of, may_be_on_hub
from rebel.types import Judge

REMOTE = "openai:"
KINDS = (
    "a judge is file.py:function, package.module:function, openai:MODEL, a table in a .json or .jsonl file, "
    "or the folder or hub name (owner/name) of a model"
)


@dataclass(frozen=True, slots=True)
class Service:
    """How a judge behind an endpoint is asked; `key_variable` names the environment variable with the key."""

    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    request: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    deadline: float = 120.0
    cache: Path | None = None


def load_judge(
    spec: str,
    notes: Notes | None = None,
    template: str | None = None,
    service: Service | None = None,
    **model_settings: Any,
) -> Judge:
    """The judge of that name. `template` is a file; `model_settings` are those of a model in this process."""
    notes = notes or Notes()
    if spec.startswith(REMOTE):
        return remote(spec.removeprefix(REMOTE), notes, template_of(template, TEMPLATE), service or Service())
    path = Path(spec).expanduser()
    if path.suffix in (".json", ".jsonl"):
        return table_of_file(path)
    function = None if path.is_dir() else function_of(spec, "--judge")
    if function is not None:
        return FunctionJudge(function, notes=notes)
    if path.is_dir() or may_be_on_hub(spec):
        return model_judge(str(path) if path.is_dir() else spec, template_of(template, FORCED), **model_settings)
    raise RebelError(f"--judge {spec} is neither a function nor a table nor a model; {KINDS}")


def remote(model: str, notes: Notes, template: str, service: Service) -> Judge:
    """The model behind an endpoint. Its client is imported only here: it is an extra, and slow to load."""
    if not model:
        raise RebelError("--judge openai: names no model; give openai:MODEL")
    if importlib.util.find_spec("openai") is None:
        raise RebelError(f'--judge openai:{model} needs the package openai: pip install "rebel-rl[judge]"')
    client = importlib.import_module("rebel.rewards.judge_client")
    return client.OpenAIJudge(
        model,
        service.base_url,
        service.key_variable,
        template,
        service.request,
        service.concurrency,
        service.deadline,
        service.cache,
        notes,
    )
