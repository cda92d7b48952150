"""The settings of a run: YAML, flags or Python -> RebelConfig, and back to YAML. Imports no torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_origin, get_type_hints

import yaml

from rebel import config as config_module
from rebel.config import RebelConfig
from rebel.convert import expected, is_nothing, shown, typed
from rebel.elsewhere import unknown
from rebel.errors import RebelError

STRAY = (
    "; a word that belongs to no flag is taken for the YAML file of settings (flags of true or false take true, "
    "false, or nothing)"
)
LENGTHS = ("iterations", "max_steps", "num_train_epochs", "rounds")
"""Ways of saying how long to train, of which one is taken."""

_TITLE = re.compile(r"\s+# -- (.+?) -+$")


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of RebelConfig as a user meets it."""

    name: str
    section: str
    help: str
    hint: Any
    default: Any


@cache
def known() -> dict[str, Setting]:
    """Every setting by its name, in the order of config.py."""
    hints, defaults = get_type_hints(RebelConfig), vars(RebelConfig())
    return {name: Setting(name, section, text, hints[name], defaults[name]) for name, section, text in _documented()}


def _documented() -> Iterator[tuple[str, str, str]]:
    """(name, section, docstring) of each field, from the source: Python keeps neither of the two."""
    source = Path(config_module.__file__).read_text("utf-8")
    titles = {k: found[1] for k, line in enumerate(source.splitlines(), 1) if (found := _TITLE.match(line))}
    settings = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    for field, text in pairwise(settings.body):
        if isinstance(field, ast.AnnAssign):
            section = titles[max(line for line in titles if line < field.lineno)]
            yield field.target.id, section, " ".join(text.value.value.split())  # pyright: ignore


def read_yaml(path: str | Path | None) -> dict[str, Any]:
    """The settings in a YAML file, as they stand there; none without a file."""
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        stray = "" if str(path).endswith((".yaml", ".yml")) else STRAY
        raise RebelError(why + stray) from None
    except yaml.YAMLError as error:
        raise RebelError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | NoneType):
        raise RebelError(f"{path} must hold lines such as `num_generations: 8`")
    return {str(name).replace("-", "_"): value for name, value in (values or {}).items()}


def resolve(*layers: Mapping[str, Any]) -> RebelConfig:
    """The settings of the layers, later ones over earlier ones. Names every wrong name and value at once.

    Of the ways to say how long to train a later layer's takes the place of any of an earlier one.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        outdated = LENGTHS if said_anew(layer) else ()
        given = {name: value for name, value in given.items() if name not in outdated} | dict(layer)
    values, problems = {}, []
    for name, value in given.items():
        try:
            values[name] = convert(name, value)
        except RebelError as error:
            problems.append(str(error))
    if problems:
        raise RebelError("\n".join(problems))
    return RebelConfig(**values)


def said_anew(layer: Mapping[str, Any]) -> bool:
    """Whether a layer says how long to train: rollouts that are given do, a length of null or a max_steps of -1 not."""
    said = {name: layer[name] for name in (*LENGTHS, "from_rollouts") if not is_nothing(layer.get(name))}
    return any(str(value) != str(getattr(RebelConfig, name)) for name, value in said.items())


def dump(config: RebelConfig) -> str:
    """The settings as YAML, under the headings of config.py; what `read_yaml` and `resolve` take back."""
    sections = groupby(known().values(), key=lambda setting: setting.section)
    return "\n".join(
        f"# {title}\n" + yaml.safe_dump({s.name: getattr(config, s.name) for s in group}, sort_keys=False)
        for title, group in sections
    )


def convert(name: str, value: Any) -> Any:
    """The value in the setting's own type, from YAML, the text of the command line, or Python."""
    if name not in known():
        raise RebelError(unknown(name, known()))
    hint = known()[name].hint
    if value is None and get_origin(hint) in (list, dict):  # an empty line in YAML, or TRL's default
        return known()[name].default.copy()
    try:
        return typed(value, hint)
    except (ValueError, OverflowError):
        raise RebelError(f"--{name} {shown(value)}: {expected(hint)} is expected") from None
