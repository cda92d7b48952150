"""Two sets of completions of the same prompts, ours and theirs, compared by a judge in both orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rebel.errors import RebelError
from rebel.evaluate import text
from rebel.types import Comparison, Judge, Prompt, Rollout
from rebel.winrates import Lengths, Verdict, WinRate, checked, lengths, score_of, win_rate

Contents = list[list[Any]]
"""Completions, as a reward reads them, of each prompt."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A completion of ours and one of theirs; `number` is that of their prompt."""

    number: int
    prompt: Prompt
    ours: Any
    theirs: Any


@dataclass(frozen=True, slots=True)
class Duel:
    """The pairs with what the judge said of them, and what that comes to."""

    pairs: Sequence[Pair]
    verdicts: Sequence[Verdict]
    result: WinRate
    lengths: Lengths

    def metrics(self) -> dict[str, float]:
        """As a run's evaluation reports them."""
        return {
            "eval/win_rate": self.result.win_rate,
            "eval/win_rate_low": self.result.low,
            "eval/win_rate_high": self.result.high,
            "eval/win_ties": self.result.ties,
            "eval/swap_consistency": self.result.swap_consistency,
            "eval/judge_unanswered": float(self.result.unanswered),
            "eval/win_rate_equal_length": self.lengths.controlled,
        }

    def row(self, place: int) -> dict[str, Any]:
        """A pair as text, with P(ours is better) in both orders and their mean."""
        pair, verdict = self.pairs[place], self.verdicts[place]
        backward = None if verdict.backward is None else 1 - verdict.backward
        return {
            "prompt": text(pair.prompt.content),
            "ours": text(pair.ours),
            "theirs": text(pair.theirs),
            "score": verdict.score,
            "ours_first": verdict.forward,
            "ours_second": backward,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(place) for place in range(len(self.pairs))]

    def summary(self) -> dict[str, Any]:
        return {**asdict(self.result), "length": asdict(self.lengths), "lengths_differ": self.lengths.differ}


def paired(ours: Sequence[Rollout], theirs: Contents) -> list[Pair]:
    """The k-th completion of ours with the k-th of theirs, which begin again where they are fewer."""
    return [
        Pair(number, rollout.prompt, completion.content, others[k % len(others)])
        for number, (rollout, others) in enumerate(zip(ours, theirs, strict=True))
        for k, completion in enumerate(rollout.completions)
    ]


def duel(judge: Judge, pairs: Sequence[Pair], measure: Callable[[Any], int], seed: int) -> Duel:
    """The pairs judged; `measure` gives the length of a completion, `seed` is the interval's."""
    verdicts = judged(judge, pairs)
    result = win_rate(verdicts, seed)
    answered = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.score is not None]
    scores = [score_of(verdict) for _, verdict in answered]
    long = lengths(scores, [measure(p.ours) for p, _ in answered], [measure(p.theirs) for p, _ in answered])
    return Duel(pairs, verdicts, result, long)


def judged(judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
    """What the judge says of each pair in both orders. Equal completions are a tie, and are not shown to it."""
    asked = [pair for pair in pairs if pair.ours != pair.theirs]
    forward = [Comparison(pair.prompt, pair.ours, pair.theirs) for pair in asked]
    backward = [Comparison(pair.prompt, pair.theirs, pair.ours) for pair in asked]
    answers = checked(judge([*forward, *backward]), 2 * len(asked), judge.name) if asked else []
    both = iter(zip(answers[: len(asked)], answers[len(asked) :], strict=True))
    return [
        Verdict(pair.number, *(next(both) if pair.ours != pair.theirs else (0.5, 0.5)))  # in the order of `asked`
        for pair in pairs
    ]


def references(prompts: Sequence[Prompt], column: str) -> Contents:
    """The written completion of each prompt, from a column of the dataset, in the form that a reward reads."""
    found = []
    for number, prompt in enumerate(prompts):
        written = prompt.meta.get(column)
        if column not in prompt.meta:
            raise RebelError(
                f"the dataset has no column {column!r} with references; beside the prompt it has "
                f"{', '.join(prompt.meta) or 'none'}: set --reference_column"
            )
        if not written:
            raise RebelError(f"the reference of prompt {number} ({text(prompt.content)[:60]!r}) is empty")
        chat = not isinstance(prompt.content, str)
        found.append([[{"role": "assistant", "content": written}] if chat and isinstance(written, str) else written])
    return found


def words(content: Any) -> str:
    """The text that was written, without the names of roles."""
    if isinstance(content, list) and all(isinstance(message, dict) for message in content):
        return "\n".join(str(message.get("content")) for message in content)
    return text(content)
