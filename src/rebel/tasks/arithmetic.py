"""`rebel quickstart`: a model that adds two-digit numbers half of the time learns to do it from right and wrong alone.

Everything is made here: the problems, the model, and its first, supervised lessons. REBEL then sees problems
without answers; the verifier `exact` is its only teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rebel.data import shuffled

ALPHABET = "0123456789+="
LONGEST_ANSWER = 3
HELD_OUT = 500
EXAM = 500
MEDIOCRE = 0.45
"""Greedy accuracy at which the supervised lessons end."""

Problem = dict[str, str]


def exact(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 for a completion that is the answer to the letter, else 0."""
    return [float(given == right) for given, right in zip(completions, answer, strict=True)]


@dataclass(frozen=True, slots=True)
class Problems:
    """All additions of two two-digit numbers, in two parts that share none."""

    training: list[Problem]
    held_out: list[Problem]

    @classmethod
    def of(cls, seed: int) -> Problems:
        every = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 100) for b in range(10, 100)]
        mixed = [every[i] for i in shuffled(len(every), seed)]
        return cls(mixed[HELD_OUT:], mixed[:HELD_OUT])
