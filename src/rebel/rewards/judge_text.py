"""What a language model reads as a judge, and how its answer is understood."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rebel.errors import RebelError
from rebel.types import Comparison

TEMPLATE = """\
Below are a request and two answers to it. Decide which answer is better. Neither their order nor their length counts.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one word: A if answer A is better, B if answer B is better, tie if they are equally good."""

FORCED = TEMPLATE.rpartition("\n")[0] + "\nReply with one letter: A if answer A is better, B if answer B is better."
"""Without the tie: for a model whose P(A) against P(B) is read off its next token."""

PLACES = ("{prompt}", "{first}", "{second}")

SAYS = re.compile(
    r"(?:.*\b(?:answer|verdict|winner|choice|decision|better|preferred)\b(?:\s+(?:answer|one))?\s*(?:is|:)+\s*)?"
    r"(?:answer\s+)?(?P<said>A|B|tie)",
    re.IGNORECASE,
)


def template_of(given: str | None, default: str = TEMPLATE) -> str:
    """The template of --judge_template: the text of a file, or the default."""
    if given is None:
        return default
    path = Path(given).expanduser()
    if not path.is_file():
        raise RebelError(f"--judge_template {given}: there is no such file")
    text = path.read_text("utf-8")
    missing = [place for place in PLACES if place not in text]
    if missing:
        raise RebelError(f"--judge_template {given} lacks {' and '.join(missing)}; it has to hold {', '.join(PLACES)}")
    return text


def question(template: str, comparison: Comparison) -> str:
    """The template with prompt and completions in it; braces in those mean nothing."""
    sides = (comparison.prompt.content, comparison.first, comparison.second)
    given: dict[str, str] = dict(zip(PLACES, map(as_text, sides), strict=True))
    return re.sub("|".join(map(re.escape, PLACES)), lambda found: given[found.group()], template)


def as_text(content: Any) -> str:
    """Plain text as it is; a single message as its content, a dialogue with its roles."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return str(content[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def verdict(answer: str) -> float | None:
    """P(first > second) from what a judge wrote: 1 for A, 0 for B, 0.5 for a tie; None where it cannot be told.

    The last line counts: a letter or "tie" alone, in whatever brackets, or "the better answer is B".
    """
    lines = [line.strip(" \t\"'`*_#[](){}<>.,:;!") for line in answer.splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    found = SAYS.fullmatch(re.sub(r"[*_`\[\]()]", "", last).strip())
    return {"A": 1.0, "B": 0.0, "TIE": 0.5}[found["said"].upper()] if found else None
