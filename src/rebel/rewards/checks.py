"""Verifiers: reward functions that look an answer up instead of judging it."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rebel.types import Content

NUMBER = re.compile(
    r"""(?:(?<![\w)])(?P<minus>-)\s?)?       # a minus sign, but not the dash of 5-3
        \$?
        (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)""",
    re.VERBOSE,
)
MARK = "####"
"""What GSM8K writes before its answers."""


def exact_match(completions: list[Content], answer: list[Any], **kwargs: Any) -> list[float | None]:
    """1 for a completion that ends in the right answer and 0 for others; None where a row has no answer.

    Where the answer is a number, so is what counts: the first one after "####", or else the last one of the completion,
    whatever its thousands separators, currency sign or zeros behind the point. Any other answer must be the whole
    completion, or all that follows "####", up to white space and capitals.
    """
    return [
        None if right is None else float(_matches(_text(completion), str(right)))
        for completion, right in zip(completions, answer, strict=True)
    ]


def _matches(given: str, right: str) -> bool:
    right = _after_mark(right)
    whole = NUMBER.fullmatch(_plain(right))
    if whole is None:
        return _folded(_after_mark(given)) == _folded(right)
    return final_number(given) == _value(whole)


def final_number(text: str) -> Decimal | None:
    """The number a solution ends in: the first after "####", or else the last one; None where there is none."""
    found = [_value(match) for match in NUMBER.finditer(_plain(_after_mark(text)))]
    if not found:
        return None
    return found[0] if MARK in text else found[-1]


def _value(match: re.Match[str]) -> Decimal:
    number = Decimal(match["digits"].replace(",", ""))
    return -number if match["minus"] else number


def _after_mark(text: str) -> str:
    return text.partition(MARK)[2] if MARK in text else text


def _plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-").strip()


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _text(completion: Content) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
