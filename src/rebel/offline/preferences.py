"""Data that somebody else wrote and judged: preference pairs, scored groups, comparisons of a prompt's completions.

Pure reading: a row becomes a prompt with its completions, and rewards or margins. What a row says wrongly is an error
that names the row; what merely cannot be used is passed over with a reason, to be counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from trl.data_utils import maybe_extract_prompt

from rebel.data import is_messages, prompt_of
from rebel.errors import RebelError
from rebel.margins import CLIP, Vote, checked_margins, margins_of_probabilities, margins_of_votes
from rebel.types import Content, Prompt

Format = Literal["preferences", "groups", "comparisons"]
MarginType = Literal["margin", "probability", "votes"]
Row = Mapping[str, Any]

SAME, NO_VOTES = "chosen equal to rejected", "votes without a winner"
ALONE, TURNS = "fewer than two completions", "turns of others within a completion"
"""Why a row is passed over."""

FORMATS = "chosen and rejected; completions and rewards; or completions and comparisons"
TEXTS = ("text", "completion", "content")
"""Where a completion that is a dictionary has its text."""


@runtime_checkable
class Table(Protocol):
    """Rows by number: a Dataset, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are to be read. Without a `margin_column` chosen is better than rejected by `constant`.

    `by_reward`: reward functions will score the completions, and no margins are read.
    """

    format: Format
    prompt_column: str = "prompt"
    margin_column: str | None = None
    margin_type: MarginType = "margin"
    constant: float = 1.0
    clip: float = CLIP
    by_reward: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """A prompt and its completions in the words of the data, with what is known of their worth."""

    prompt: Prompt
    completions: tuple[Content, ...]
    rewards: Float[Tensor, " G"] | None = None
    margins: Float[Tensor, "G G"] | None = None


def format_of(columns: Sequence[str], given: str, margin_column: str | None, by_reward: bool, name: str) -> Format:
    """The format of a data set from its columns, or the given one if the columns have it."""
    pairs = {"chosen", "rejected"} <= {*columns}
    compared = margin_column if margin_column and margin_column != "rewards" else "comparisons"
    found: dict[str, bool] = {
        "preferences": pairs,
        "comparisons": "completions" in columns and compared in columns,
        "groups": "completions" in columns and (compared not in columns or "rewards" in columns),
    }
    possible = [kind for kind, holds in found.items() if holds]
    if given != "auto":
        if not found[given] and not (given == "groups" and "completions" in columns):
            raise RebelError(f"--data_format {given} does not fit {name}, which has the columns {', '.join(columns)}")
        return given  # pyright: ignore[reportReturnType]  # one of the three
    if len(possible) > 1:
        raise RebelError(f"{name} can be read as {' and as '.join(possible)}; choose by --data_format")
    if not possible:
        raise RebelError(
            f"{name} has no completions to learn from: it has the columns {', '.join(columns)}, and --offline takes "
            + FORMATS
            + (
                " (with --reward_funcs, completions alone)"
                if by_reward
                else "; and for completions that are drawn a reward is missing: --reward_funcs"
            )
        )
    return possible[0]  # pyright: ignore[reportReturnType]


def reading_of(columns: Sequence[str], given: Reading | None = None, **settings: Any) -> Reading:
    """The way to read a data set with these columns; a column `margin` or `comparisons` is taken where there is one."""
    reading = given or Reading(**settings)
    usual = {"preferences": "margin", "comparisons": "comparisons", "groups": "rewards"}[reading.format]
    column = reading.margin_column or (usual if usual in columns else None)
    if column and column not in columns and not reading.by_reward:
        raise RebelError(f"--margin_column {column}: the data have only the columns {', '.join(columns)}")
    return Reading(**{**{f: getattr(reading, f) for f in Reading.__slots__}, "margin_column": column})


def read(row: Row, how: Reading, where: str) -> Recorded | str:
    """The group of a row, or the reason why it is passed over. Errors name the row by `where`."""
    return {"preferences": read_pair, "groups": read_group, "comparisons": read_comparisons}[how.format](
        row, how, where
    )


# -- pairs ---------------------------------------------------------------------------------------------------------


def read_pair(row: Row, how: Reading, where: str) -> Recorded | str:
    """Chosen and rejected; the prompt explicit, or what both have in common at their beginning."""
    sides = [row.get("chosen"), row.get("rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        check_content(side, f"{where}: {name}")
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise RebelError(f"{where}: one of chosen and rejected is text and the other one messages; make both the same")
    if sides[0] == sides[1]:
        return SAME
    parts = split(row, how, where)
    if isinstance(parts, str):
        return parts
    prompt, chosen, rejected = parts
    if how.by_reward:
        return Recorded(prompt, (chosen, rejected))
    margin = margin_of_pair(row, how, where)
    if margin is None:
        return NO_VOTES
    return Recorded(
        prompt, (chosen, rejected), margins=torch.tensor([[0.0, margin], [-margin, 0.0]], dtype=torch.float64)
    )


def split(row: Row, how: Reading, where: str) -> tuple[Prompt, Content, Content] | str:
    """Prompt, chosen and rejected of a row; an implicit prompt, or one that both conversations repeat, is taken out."""
    column = how.prompt_column
    meta = {k: v for k, v in row.items() if k not in (column, "chosen", "rejected")}
    parts: Any = {"chosen": row["chosen"], "rejected": row["rejected"]}
    if column in row:
        given = prompt_of({column: row[column]}, column, where).content
        if isinstance(given, list) and isinstance(row["chosen"], str):
            raise RebelError(f"{where}: the prompt is messages, chosen and rejected are text; make them the same")
        if not repeated(given, parts, where):
            parts["prompt"] = given
    found: Any = maybe_extract_prompt(parts)
    if not found["prompt"]:
        raise RebelError(f"{where}: chosen and rejected have no beginning in common, so their prompts differ")
    for side in (found["chosen"], found["rejected"]):
        if isinstance(side, list) and side[0]["role"] != "assistant":
            raise RebelError(f"{where}: chosen and rejected part before any answer, so their prompts differ")
        if isinstance(side, list) and any(message["role"] != "assistant" for message in side):
            return TURNS
    prompt = prompt_of({**meta, column: found["prompt"]}, column, where)
    return prompt, found["chosen"], found["rejected"]


def repeated(prompt: Content, sides: Mapping[str, Content], where: str) -> bool:
    """Whether both conversations begin with the prompt."""
    begins = [isinstance(prompt, list) and side[: len(prompt)] == prompt for side in sides.values()]
    if any(begins) and not all(begins):
        raise RebelError(f"{where}: only one of chosen and rejected repeats the prompt, so their prompts differ")
    return all(begins)


def margin_of_pair(row: Row, how: Reading, where: str) -> float | None:
    """How much better chosen is than rejected, 0 or more; None for votes without a winner."""
    if how.margin_column is None:
        return how.constant
    value = row[how.margin_column]
    if how.margin_type == "votes":
        margin = margin_of_count(value, how, where)
    elif how.margin_type == "probability":
        margin = logit(number(value, how, where), how.clip, f"{where}: {how.margin_column}")
    else:
        margin = number(value, how, where)
    if margin is not None and margin < 0:
        raise RebelError(
            f"{where}: {how.margin_column} is {shown(value)}, by which rejected is better than chosen. A margin is "
            "that of chosen over rejected, 0 or more; if the column has another sign or another order, turn it around"
        )
    return margin


def number(value: Any, how: Reading, where: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise RebelError(f"{where}: {how.margin_column} is {shown(value)}; give a finite number, or take the row out")
    return found


def margin_of_count(value: Any, how: Reading, where: str) -> float | None:
    """The clipped logit of the share of votes for chosen, from [for chosen, for rejected]; None without any vote."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise RebelError(f"{where}: {how.margin_column} is {shown(value)}; votes are [for chosen, for rejected]")
    votes = [number(count, how, where) for count in value]
    if min(votes) < 0:
        raise RebelError(f"{where}: {how.margin_column} is {shown(value)}; votes are counts, 0 or more")
    return logit(votes[0] / sum(votes), how.clip, where) if sum(votes) else None


def logit(probability: float, clip: float, where: str) -> float:
    """The margin in nats of P(chosen is better), clipped."""
    matrix = torch.tensor([[math.nan, probability], [math.nan, math.nan]], dtype=torch.float64)
    try:
        return float(margins_of_probabilities(matrix, clip)[0, 1])
    except RebelError as wrong:
        raise RebelError(f"{where}: {wrong}") from None


# -- groups --------------------------------------------------------------------------------------------------------


def read_group(row: Row, how: Reading, where: str) -> Recorded | str:
    """A prompt with any number of completions, each with a reward: in a column, or in the completions themselves."""
    completions = completions_of(row, where)
    if len(completions) < 2:
        return ALONE
    prompt = prompt_with_columns(row, how, where)
    if how.by_reward:
        return Recorded(prompt, completions)
    rewards = row.get(how.margin_column) if how.margin_column else None
    if rewards is None:
        given = [c.get("reward") if isinstance(c, Mapping) else None for c in row["completions"]]
        rewards = given if any(value is not None for value in given) else None
    if not isinstance(rewards, list | tuple) or len(rewards) != len(completions):
        raise RebelError(
            f"{where}: {len(completions)} completions need as many rewards, and "
            f"{how.margin_column or 'rewards'} is {shown(rewards)}; give a list, or score them by --reward_funcs"
        )
    values = [math.nan if value is None else value for value in rewards]
    if not all(isinstance(value, int | float) for value in values):
        raise RebelError(f"{where}: {shown(rewards)} has a reward that is no number; null means that there is none")
    return Recorded(prompt, completions, rewards=torch.tensor(values, dtype=torch.float64))


def read_comparisons(row: Row, how: Reading, where: str) -> Recorded | str:
    """A prompt with completions that were compared pair by pair, contradictions included."""
    completions = completions_of(row, where)
    if len(completions) < 2:
        return ALONE
    prompt = prompt_with_columns(row, how, where)
    if how.by_reward:
        return Recorded(prompt, completions)
    assert how.margin_column, "format_of found it"
    given = row[how.margin_column]
    try:
        margins = margins_of(given, len(completions), how)
    except RebelError as wrong:
        raise RebelError(f"{where}: {how.margin_column}: {wrong}") from None
    return NO_VOTES if margins is None else Recorded(prompt, completions, margins=margins)


def margins_of(given: Any, count: int, how: Reading) -> Float[Tensor, "G G"] | None:
    """Margins from a matrix (row over column, null where nobody compared) or from votes {first, second, share}."""
    if isinstance(given, list) and all(isinstance(vote, Mapping) for vote in given):
        votes = [vote for vote in map(vote_of, given) if vote.share is not None and not math.isnan(vote.share)]
        return margins_of_votes(count, votes, how.clip) if votes else None
    square = isinstance(given, list) and len(given) == count
    if not square or not all(isinstance(line, list) and len(line) == count for line in given):
        raise RebelError(
            f"it is {shown(given)}; give a matrix of {count} x {count}, or votes with first, second and "
            "share; for a reward of each completion use --data_format groups"
        )
    lines = [[math.nan if x is None else float(x) for x in line] for line in given]
    matrix = torch.tensor(lines, dtype=torch.float64)
    if how.margin_type == "margin":
        return checked_margins(matrix)
    if how.margin_type == "votes":
        if matrix.nan_to_num(nan=0.0).abs().max() > 1:
            raise RebelError("votes in a matrix are 1 (better), 0 (tie) and -1 (worse)")
        matrix = (matrix + 1) / 2
    matrix = matrix.masked_fill(torch.eye(count, dtype=torch.bool), math.nan)
    return margins_of_probabilities(matrix, how.clip)


def vote_of(given: Row) -> Vote:
    """A vote as the data have it."""
    try:
        share = given.get("share")
        return Vote(int(given["first"]), int(given["second"]), None if share is None else float(share))
    except (KeyError, TypeError, ValueError):
        raise RebelError(f"{shown(dict(given))} is no vote; give first and second (places from 0), and share") from None


def completions_of(row: Row, where: str) -> tuple[Content, ...]:
    """The completions of a row: texts, messages, or dictionaries with a text."""
    given = row.get("completions")
    if not isinstance(given, list | tuple):
        raise RebelError(f"{where}: completions is {shown(given)}; give a list of texts or of messages")
    found = []
    for place, item in enumerate(given):
        content = item
        if isinstance(item, Mapping):
            content = next((item[key] for key in TEXTS if item.get(key) is not None), None)
        check_content(content, f"{where}: completion {place}")
        found.append(content)
    return tuple(found)


def prompt_with_columns(row: Row, how: Reading, where: str) -> Prompt:
    if how.prompt_column not in row:
        raise RebelError(f"{where} has no column {how.prompt_column!r}; set --prompt_column")
    return prompt_of({k: v for k, v in row.items() if k != "completions"}, how.prompt_column, where)


def check_content(content: Any, where: str) -> None:
    """Raises RebelError for what is no completion."""
    if content is None:
        raise RebelError(f"{where} is missing; take the row out of the data")
    if not isinstance(content, str) and not (content and is_messages(content)):
        raise RebelError(f"{where} is {shown(content)}; give text, or a list of messages with role and content")
    text = content if isinstance(content, str) else content[-1]["content"]
    if not (text or "").strip():
        raise RebelError(f"{where} is empty; take the row out of the data")


def shown(value: Any) -> str:
    return f"{str(value)[:60]!r}" if isinstance(value, str | list | dict) else str(value)
