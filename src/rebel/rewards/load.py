"""Rewards by name: a function in a file or a package, one of `trl.rewards` or of our own, or a reward model."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import trl.rewards
from transformers import PreTrainedModel

from rebel.errors import RebelError
from rebel.rewards import checks, images
from rebel.rewards.clip import SOURCES, clip_reward
from rebel.rewards.functions import Notes, PerCompletion
from rebel.rewards.models import RewardModel
from rebel.types import Reward

OWN: dict[str, Callable[..., Any]] = {
    "exact_match": checks.exact_match,
    "jpeg_compressibility": images.jpeg_compressibility,
    "jpeg_incompressibility": images.jpeg_incompressibility,
}
OF_TRL: list[str] = trl.rewards.__all__  # pyright: ignore[reportAttributeAccessIssue]  # its module is a lazy one
NEED_MATH_VERIFY = ("accuracy_reward", "reasoning_accuracy_reward")
KINDS = (
    "a reward is file.py:function, package.module:function, a name of trl.rewards, "
    "the folder or hub name (owner/name) of a reward model, or of images jpeg_compressibility, "
    "jpeg_incompressibility, or one of clip_score, pickscore, hpsv2 and aesthetic with its weights: hpsv2:FOLDER"
)


def as_reward(
    what: str | Callable[..., Any] | PreTrainedModel,
    notes: Notes | None = None,
    tokenizer: Any = None,
    **model_settings: Any,
) -> Reward:
    """A reward from what users give: a name (see `load_reward`), a function, or a model with its tokenizer."""
    if isinstance(what, str):
        return load_reward(what, notes, **model_settings)
    if isinstance(what, PreTrainedModel):
        return RewardModel(what, tokenizer, **model_settings)
    return PerCompletion(what, notes=notes or Notes())


def load_reward(spec: str, notes: Notes | None = None, flag: str = "--reward_funcs", **model_settings: Any) -> Reward:
    """The reward of that name. `model_settings` are those of a model, should it be one; `flag` is what named it."""
    if reward := clip_reward(spec, notes, flag, **model_settings):
        return reward
    folder = Path(spec).expanduser()
    function = _named(spec) or (None if folder.is_dir() else function_of(spec, flag))
    if function is not None:
        return PerCompletion(function, notes=notes or Notes())
    if folder.is_dir() or may_be_on_hub(spec):
        return RewardModel(folder if folder.is_dir() else spec, **model_settings)
    raise RebelError(f"{flag} {spec} is neither a function nor a model{_nearest(spec, _names())}; {KINDS}")


def _names() -> list[str]:
    ready = [name for name in OF_TRL if not name.startswith("get_")]
    return sorted([*ready, *OWN, *SOURCES])


def _named(spec: str) -> Callable[..., Any] | None:
    """A function of our own or of trl.rewards."""
    if spec in OWN:
        return OWN[spec]
    if spec not in OF_TRL:
        return None
    if spec.startswith("get_"):
        raise RebelError(
            f"--reward_funcs {spec} makes a reward function from its settings: write `reward = {spec}(...)` "
            "into a file rewards.py and give rewards.py:reward"
        )
    if spec in NEED_MATH_VERIFY and importlib.util.find_spec("math_verify") is None:
        raise RebelError(f'--reward_funcs {spec} needs the package math-verify: pip install "rebel-rl[math]"')
    return getattr(trl.rewards, spec)


def function_of(spec: str, flag: str = "--reward_funcs") -> Callable[..., Any] | None:
    """The function of file.py:function or package.module:function; None where the text is neither."""
    return _in_file(spec, flag) or _in_module(spec, flag)


def _in_file(spec: str, flag: str) -> Callable[..., Any] | None:
    """The function of file.py:function."""
    file, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise RebelError(f"{flag} {spec} names no function of that file; give {spec}:function")
    if not file.endswith(".py"):
        return None
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise RebelError(f"{flag} {spec}: there is no file {file}")
    _findable(path.parent)
    return _member(_imported(spec, functools.partial(_run_file, path, path.stat().st_mtime_ns), flag), name, spec, flag)


def _in_module(spec: str, flag: str) -> Callable[..., Any] | None:
    """The function of package.module:function, or of package.module.function as TRL's command line has it."""
    separator = ":" if ":" in spec else "."
    module, _, name = spec.rpartition(separator)
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        return None
    _findable(Path.cwd())
    return _member(_imported(spec, functools.partial(importlib.import_module, module), flag), name, spec, flag)


def _findable(folder: Path) -> None:
    """Lets modules in that folder be imported, behind all others so that none of them is hidden."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@functools.cache
def _run_file(path: Path, changed: int) -> ModuleType:
    """The module of a file; once for all functions in it, and again when it has changed."""
    found = importlib.util.spec_from_file_location(f"rebel_reward_{path.stem}", path)
    assert found is not None and found.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def _imported(spec: str, load: Callable[[], ModuleType], flag: str) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:
        reason = (str(error).strip() or "no reason given").splitlines()[-1]
        raise RebelError(f"{flag} {spec} cannot be imported: {type(error).__name__}: {reason}") from error


def _member(module: ModuleType, name: str, spec: str, flag: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RebelError(f"{flag} {spec}: there is no {name!r} in it{_nearest(name, functions)}")
    found = getattr(module, name)
    if not callable(found):
        raise RebelError(f"{flag} {spec} is of type {type(found).__name__}, not a function")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def may_be_on_hub(spec: str) -> bool:
    owner, _, name = spec.partition("/")
    return bool(owner.strip(".~") and name and "/" not in name)
