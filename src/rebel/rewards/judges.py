"""Judges: P(first > second | x) from a function, from a table, or from rewards; and both orders asked.

Nothing here requires that preferences are transitive: only the last kind of judge, made of a reward, always is.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rebel.errors import RebelError
from rebel.rewards.functions import (
    Notes,
    RewardFailed,
    columns_of,
    event_loop,
    is_async,
    name_of,
    parameters_of,
    required,
    takes_any,
)
from rebel.types import Comparison, Completion, Judge, Prompt, Reward, Rollout

Answers = list[float | None]

PASSED = ("prompts", "first", "second", "trainer_state", "log_metric")
CALL = "fn(prompts, first, second, **columns) -> a number from 0 to 1, or None, for each comparison"


class JudgeFailed(RewardFailed):
    """A judge raised; `cases` are the two completions of the comparison at fault, where it could be found out."""

    def __init__(self, name: str, comparisons: Sequence[Comparison], cause: Exception) -> None:
        cases = [(c.prompt, Completion(side, None)) for c in comparisons for side in (c.first, c.second)]
        super().__init__(name, cases, cause)
        given = "1 comparison" if len(comparisons) == 1 else f"one of {len(comparisons)} comparisons"
        self.args = (f"the judge {name} raised {type(cause).__name__} for {given}: {cause}",)


@dataclass(frozen=True, slots=True)
class FunctionJudge:
    """A judge from a function (sync or async) that is called once with all comparisons of a batch.

    `fn(prompts, first, second, **columns)` returns P(first > second) for each comparison: 1, 0, 0.5 for a tie, anything
    between, or None where it has no answer. Columns of the dataset come by name, as reward functions get them.
    """

    fn: Callable[..., Any]
    name: str = ""
    notes: Notes = field(default_factory=Notes)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or name_of(self.fn))
        names = parameters_of(self.fn)
        refused = [passed for passed in PASSED if passed not in names]
        if names and refused and not takes_any(names):
            raise RebelError(
                f"the judge {self.name} takes ({', '.join(map(str, names))}), but it is called as {CALL}: name "
                "what it needs and end its arguments with **kwargs"
            )

    def __call__(self, comparisons: Sequence[Comparison]) -> Answers:
        if not comparisons:
            return []
        try:
            values = self._call(comparisons)
        except Exception as cause:
            raise JudgeFailed(self.name, self._at_fault(comparisons, cause), cause) from cause
        return checked(values, len(comparisons), self.name)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises RebelError where the function needs a column that these prompts lack."""
        columns = columns_of(prompts)
        lacking = [name for name in required(parameters_of(self.fn)) if name not in (*columns, *PASSED)]
        if lacking:
            raise RebelError(
                f"the judge {self.name} needs the column {' and '.join(lacking)}; "
                f"the dataset has {', '.join(columns) or 'no column'} beside the prompt"
            )

    def _call(self, comparisons: Sequence[Comparison]) -> Any:
        columns = {name: [c.prompt.meta.get(name) for c in comparisons] for name in columns_of(_prompts(comparisons))}
        given = columns | {
            "prompts": [c.prompt.content for c in comparisons],
            "first": [c.first for c in comparisons],
            "second": [c.second for c in comparisons],
            "trainer_state": self.notes.trainer_state,
            "log_metric": self.notes.log_metric,
        }
        if not is_async(self.fn):
            return self.fn(**given)
        return asyncio.run_coroutine_threadsafe(self.fn(**given), event_loop()).result()

    def _at_fault(self, comparisons: Sequence[Comparison], cause: Exception) -> Sequence[Comparison]:
        """The first comparison on which a sync function fails in the same way alone; all where there is none."""
        if len(comparisons) == 1 or is_async(self.fn):
            return comparisons
        for comparison in comparisons:
            try:
                self._call([comparison])
            except Exception as error:
                if type(error) is type(cause):
                    return [comparison]
        return comparisons


@dataclass(frozen=True, slots=True)
class TableJudge:
    """A judge that looks P(first > second) up by the labels of the two completions.

    `label(prompt, completion)` says what a completion is to the table: the text itself, its style, the model that
    wrote it. One order is enough (the other is 1 - P), two equal labels are a tie, and what is not in it has no answer.
    """

    table: Mapping[tuple[Hashable, Hashable], float]
    label: Callable[[Prompt, Any], Hashable]
    name: str = "table"

    def __post_init__(self) -> None:
        for (first, second), value in self.table.items():
            if not 0 <= value <= 1:  # false for NaN too
                raise RebelError(f"the {self.name} has P({first} > {second}) = {value:g}; use a number from 0 to 1")

    def __call__(self, comparisons: Sequence[Comparison]) -> Answers:
        return [self.probability(self.label(c.prompt, c.first), self.label(c.prompt, c.second)) for c in comparisons]

    def probability(self, first: Hashable, second: Hashable) -> float | None:
        if first == second:
            return 0.5
        if (first, second) in self.table:
            return float(self.table[first, second])
        reverse = self.table.get((second, first))
        return None if reverse is None else 1.0 - float(reverse)


def table_of_file(path: str | Path, name: str | None = None) -> TableJudge:
    """The judge of a .json or .jsonl file with rows {"prompt": ..., "first": ..., "second": ..., "p": a number}.

    A row without a prompt counts for every prompt, unless that prompt has a row of its own.
    """
    path = Path(path)
    table: dict[tuple[Hashable, Hashable], float] = {}
    for number, row in enumerate(_rows(path), 1):
        try:
            prompt = None if row.get("prompt") is None else key_of(row["prompt"])
            pair = (prompt, key_of(row["first"])), (prompt, key_of(row["second"]))
            table[pair] = float(row["p"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RebelError(
                f'--judge {path}: row {number} is not {{"prompt": ..., "first": ..., "second": ..., "p": a number}} '
                f"({type(error).__name__}: {error}); a prompt may be left out"
            ) from None
    prompts = {first[0] for first, _ in table if isinstance(first, tuple)}

    def label(prompt: Prompt, completion: Any) -> Hashable:
        own = key_of(prompt.content)
        return (own if own in prompts else None), key_of(completion)

    return TableJudge(table, label, name or path.stem)


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except OSError as error:
        raise RebelError(f"--judge {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RebelError(f"--judge {path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise RebelError(f"--judge {path} holds a {type(rows).__name__}; a list of rows is expected")
    return rows


def key_of(content: Any) -> str:
    """Text as it is; messages in one spelling, whatever the order of their keys."""
    return content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=repr)


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """The judge that a reward is: P(first > second) = sigmoid((r(first) - r(second)) / temperature).

    Always transitive. A completion without a usable reward has no answer.
    """

    reward: Reward
    temperature: float = 1.0
    name: str = "bradley_terry"

    def __call__(self, comparisons: Sequence[Comparison]) -> Answers:
        found: dict[tuple[str, str], float] = {}
        rollouts: dict[tuple[str, str], Rollout] = {}
        for comparison in comparisons:
            for side in (comparison.first, comparison.second):
                key = key_of(comparison.prompt.content), key_of(side)
                rollouts.setdefault(key, Rollout(comparison.prompt, (Completion(side, None),)))
        for key, scored in zip(rollouts, self.reward(list(rollouts.values())), strict=True):
            assert scored.rewards is not None, "a reward scores one completion at a time"
            found[key] = float(scored.rewards[0])
        return [self._probability(found, comparison) for comparison in comparisons]

    def check(self, prompts: Sequence[Prompt]) -> None:
        check = getattr(self.reward, "check", None)
        if check is not None:
            check(prompts)

    def _probability(self, found: Mapping[tuple[str, str], float], comparison: Comparison) -> float | None:
        prompt = key_of(comparison.prompt.content)
        first, second = (found[prompt, key_of(side)] for side in (comparison.first, comparison.second))
        ahead = (first - second) / self.temperature
        if math.isnan(ahead):
            return None
        return 1 / (1 + math.exp(-ahead)) if ahead >= 0 else math.exp(ahead) / (1 + math.exp(ahead))


@dataclass(frozen=True, slots=True)
class Verdicts:
    """P(first > second) of each comparison, with how far a judge contradicted itself when the two were swapped."""

    probabilities: Answers
    metrics: Mapping[str, float]


def ask(judge: Judge, comparisons: Sequence[Comparison], swap: bool = True) -> Verdicts:
    """P of each comparison. With `swap` both orders are asked: P is the mean of P(a, b) and 1 - P(b, a).

    Where one order has no answer the other alone counts. Without `swap` every other comparison is asked in the reverse
    order, so that a judge's taste for the first place favours nobody. Metrics, each a share of the comparisons:
    `swap_gap`, the mean of |P(a, b) + P(b, a) - 1|; `contradictions`, where the two orders named different winners;
    `unanswered`, where there was no answer at all.
    """
    reversed_ = [Comparison(c.prompt, c.second, c.first) for c in comparisons]
    if not swap:
        asked = [pair[k % 2] for k, pair in enumerate(zip(comparisons, reversed_, strict=True))]
        answers = checked(judge(asked), len(asked), judge.name)
        mean = [p if p is None or k % 2 == 0 else 1 - p for k, p in enumerate(answers)]
        return Verdicts(mean, {"unanswered": _share(p is None for p in mean)} if mean else {})
    answers = checked(judge([*comparisons, *reversed_]), 2 * len(comparisons), judge.name)
    forth, back = answers[: len(comparisons)], answers[len(comparisons) :]
    return Verdicts(list(map(_mean, forth, back)), consistency(forth, back))


def consistency(forth: Answers, back: Answers) -> dict[str, float]:
    """How P(a, b) and P(b, a) of the same pairs fit together."""
    both = [(p, q) for p, q in zip(forth, back, strict=True) if p is not None and q is not None]
    found = {"unanswered": _share(p is None and q is None for p, q in zip(forth, back, strict=True))} if forth else {}
    if both:
        found["swap_gap"] = sum(abs(p + q - 1) for p, q in both) / len(both)
        found["contradictions"] = _share((p - 0.5) * (q - 0.5) > 0 for p, q in both)
    return found


def checked(values: Any, count: int, name: str) -> Answers:
    """What a judge returned, as P or None for each comparison."""
    wanted = f"return a list with P(first > second), or None, for each of the {count} comparisons"
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise RebelError(f"the judge {name} returned {type(values).__name__}; {wanted}")
    values = list(values)
    if len(values) != count:
        raise RebelError(f"the judge {name} returned {len(values)} values for {count} comparisons; {wanted}")
    return list(map(partial(_probability, name), values))


def _probability(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:  # false for NaN too
        raise RebelError(
            f"the judge {name} returned {value!r} for P(first > second); return a number from 0 to 1 (0.5 for a tie), "
            "or None where there is no answer"
        )
    return number


def _mean(forth: float | None, back: float | None) -> float | None:
    known = [p for p in (forth, None if back is None else 1 - back) if p is not None]
    return sum(known) / len(known) if known else None


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


def _prompts(comparisons: Sequence[Comparison]) -> list[Prompt]:
    return [comparison.prompt for comparison in comparisons]
