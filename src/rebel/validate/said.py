"""What a check hands back, and how a setting is quoted in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rebel.config import RebelConfig
from rebel.convert import shown

Complaints = Iterator[str]
"""What is wrong, one line each: what was given, what is allowed, what to do."""

Check = Callable[[RebelConfig], Complaints]


def said(config: RebelConfig, *names: str) -> str:
    """The settings as on the command line: `--eta 1` or `--eta 1 with --beta 0.1`."""
    first, *others = (f"--{name} {shown(getattr(config, name))}" for name in names)
    return first + (" with " + " and ".join(others) if others else "")
