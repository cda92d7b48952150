"""Settings as options of the command line, and what commands have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from rebel.convert import NO, NOTHING, YES, shown
from rebel.errors import RebelError
from rebel.settings import Setting, known


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as errors of ours."""

    def error(self, message: str) -> NoReturn:
        raise RebelError(message)


def command(commands: Any, name: str, run: Any, about: str, usage: str | None = None) -> Parser:
    """The parser of a command; `run` gets what was given and returns the exit code.

    Its default `options` are to name all it takes: an unknown one is answered with the nearest of them.
    """
    parser = commands.add_parser(name, help=about, description=about, usage=usage, allow_abbrev=False)
    parser.set_defaults(command=run, options=("help",))
    return parser


def wide(prog: str) -> argparse.HelpFormatter:
    """A help with room for the long names of settings."""
    return argparse.HelpFormatter(prog, max_help_position=32)


def settings_in(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run that were given as flags, as they were given."""
    return {name: value for name, value in vars(arguments).items() if name in known()}


def add_settings(parser: Parser) -> None:
    """All settings of a run, under the headings of config.py."""
    for section, settings in groupby(known().values(), key=lambda setting: setting.section):
        group = parser.add_argument_group(section)
        for setting in settings:
            add_setting(group, setting)


def add_setting(group: Any, setting: Setting) -> None:
    """A setting as an option; its text gets its type later, in `resolve`, as a value from YAML does."""
    flags, more = [f"--{setting.name}"], {"metavar": _metavar(setting.hint)}
    if setting.name == "resume_from_checkpoint":
        flags, more = ["--resume", *flags], {"metavar": "CHECKPOINT", "nargs": "?", "const": "true"}
    elif any(get_origin(hint) is list for hint in (setting.hint, *get_args(setting.hint))):
        more |= {"nargs": "+", "action": "extend"}
    default = "" if setting.default in (None, [], {}) else f" (default: {shown(setting.default)})"
    text = setting.help.replace("%", "%%") + default
    group.add_argument(*flags, dest=setting.name, default=argparse.SUPPRESS, help=text, **more)


def _metavar(hint: Any) -> str:
    """`INT`, `FLOAT|auto`, `no|steps`: what may stand behind a flag."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is list:
        return _metavar(get_args(hint)[0])
    inner = [_metavar(kind) for kind in get_args(hint) if kind is not type(None)]
    words = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
    return words.get(hint, "YAML" if get_origin(hint) is dict else "|".join(inner))


def _is_switch(setting: Setting) -> bool:
    return setting.hint is bool or get_args(setting.hint) == (bool, type(None))


def spelled(argv: Sequence[str]) -> Iterator[str]:
    """Flags with underscores, and a value for each switch: `--no-use-peft` becomes `--use_peft=false`."""
    switches = {f"--{setting.name}" for setting in known().values() if _is_switch(setting)}
    for word, after in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--\w[\w-]*", name):
            yield word
            continue
        name = "--" + name[2:].replace("-", "_")
        if name in switches and not equals and after.lower() not in YES + NO + NOTHING:
            yield f"{name}=true"
        elif (on := "--" + name.removeprefix("--no_")) in switches and on != name:
            yield f"{on}=false"
        else:
            yield name + equals + value


def folder_of(run: str, wanted: str = "the --output_dir of a run") -> Path:
    """A folder, which has to exist."""
    if not Path(run).is_dir():
        raise RebelError(f"{run} is no folder; give {wanted}")
    return Path(run)


def holding(folder: Path, names: Iterable[str], what: str) -> Path:
    """The folder, which has to hold one of these files."""
    if not any((folder / name).exists() for name in names):
        looked_for = ", ".join(names)
        raise RebelError(f"{folder} holds no {what}: none of {looked_for} is there; give the --output_dir of a run")
    return folder
