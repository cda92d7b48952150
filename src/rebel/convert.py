"""Values in the types of RebelConfig, from YAML, the command line's text or Python; and back into words."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

YES, NO, NOTHING = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")


def typed(value: Any, hint: Any) -> Any:
    """The value in the type of the annotation `hint`; a ValueError where it does not fit."""
    if isinstance(value, Enum):
        value = value.value
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first(value, inner)
    if origin is Literal:
        return _choice(value, inner)
    if origin is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [typed(item, inner[0]) for item in items]
    return _mapping(value) if origin is dict else _PLAIN[hint](value)


def _first(value: Any, hints: tuple[Any, ...]) -> Any:
    """The value in the first type that takes it; text, which takes nearly everything, comes last."""
    for hint in sorted(hints, key=lambda hint: hint is str):
        try:
            return typed(value, hint)
        except ValueError:
            continue
    raise ValueError(value)


def _choice(value: Any, choices: tuple[str, ...]) -> str:
    """YAML reads `no` as false, and TRL took true and false for some of these."""
    also = {"false": ("no", "none"), "true": ("group",)}.get(str(value).lower(), (value,))
    for choice in choices:
        if choice in also:
            return choice
    raise ValueError(value)


def _mapping(value: Any) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise ValueError(value) from None
    if not isinstance(mapping, Mapping):
        raise ValueError(value)
    return dict(mapping)


def is_nothing(value: Any) -> bool:
    """Whether the value says that there is none, in YAML, Python or words."""
    return str(value).lower() in NOTHING


def _nothing(value: Any) -> None:
    if not is_nothing(value):
        raise ValueError(value)


def _boolean(value: Any) -> bool:
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word not in YES + NO:
        raise ValueError(value)
    return word in YES


def _real(value: Any) -> float:
    """YAML reads 1e-5, without a point, as text."""
    if isinstance(value, bool) or not isinstance(value, Real | str):
        raise ValueError(value)
    return float(value)


def _integer(value: Any) -> int:
    if not _real(value).is_integer():
        raise ValueError(value)
    return int(float(value)) if isinstance(value, str) else int(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | os.PathLike | int | float):
        raise ValueError(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    NoneType: _nothing,
    bool: _boolean,
    int: _integer,
    float: _real,
    str: _text,
}


def shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    if isinstance(value, list | tuple) and value:
        return " ".join(map(shown, value))
    if isinstance(value, str):
        return shlex.quote(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)


def expected(hint: Any) -> str:
    """The values a type takes, in words."""
    origin, inner = get_origin(hint), [kind for kind in get_args(hint) if kind is not NoneType]
    if origin in (Union, UnionType):
        return " or ".join(map(expected, inner))
    if origin is Literal:
        return " or ".join(", ".join(inner).rsplit(", ", 1))
    if origin is list:
        return f"a list of {'numbers' if inner[0] is float else 'names'}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(hint, "a mapping such as '{key: value}'")
