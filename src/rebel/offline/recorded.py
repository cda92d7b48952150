"""Recorded completions in the tokens of a policy: compact arrays of ids, with the texts left where the data are."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from rebel.errors import RebelError
from rebel.offline.preferences import Reading, Recorded, Table, read
from rebel.types import DATA, Completion, Content, Prompt, Rollout, Scored, TokenTrace

LONG_PROMPT, LONG = "prompts longer than fit", "completions longer than fit"
"""Why a row, or a completion of it, is left out."""

Encode = Callable[[Prompt], Sequence[int]]
EncodeCompletion = Callable[[Prompt, Sequence[int], Content], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """How prompts and completions become ids, and how long they may be. None of them is ever cut."""

    prompt: Encode
    completion: EncodeCompletion
    longest_prompt: int
    longest_completion: int
    longest: float

    def fit(self, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        return len(completion) <= self.longest_completion and len(prompt) + len(completion) <= self.longest


@dataclass(frozen=True)
class Groups:
    """The usable groups of a data set, a sequence of `Scored`. Only ids and places are held, texts are read again."""

    rows: Table
    how: Reading
    name: str
    number: array = field(default_factory=lambda: array("q"))
    first: array = field(default_factory=lambda: array("q", [0]))
    place: array = field(default_factory=lambda: array("i"))
    ids: array = field(default_factory=lambda: array("i"))
    ends: array = field(default_factory=lambda: array("q", [0]))
    dropped: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.number)

    def __iter__(self) -> Iterator[Scored]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> Scored:
        """Group k. Its completions are all finished: each of them ends with an end of sequence."""
        found = read(self.rows[self.number[k]], self.how, self.where(self.number[k]))
        assert isinstance(found, Recorded), "it was usable when it was taken in"
        first, last = self.first[k], self.first[k + 1]
        places = self.place[first:last]
        prompt, *traces = (self.sequence(n) for n in range(first + k, last + k + 1))
        completions = tuple(
            Completion(found.completions[place], TokenTrace(prompt, ids), source=DATA)
            for place, ids in zip(places, traces, strict=True)
        )
        chosen = torch.tensor(places.tolist())
        return Scored(
            Rollout(found.prompt, completions),
            rewards=None if found.rewards is None else found.rewards[chosen],
            margins=None if found.margins is None else found.margins[chosen][:, chosen],
        )

    @property
    def completions(self) -> int:
        """Completions of all groups."""
        return len(self.place)

    def span(self, k: int) -> slice:
        """Where the completions of group k stand among all."""
        return slice(self.first[k], self.first[k + 1])

    def sequence(self, n: int) -> tuple[int, ...]:
        """Sequence n of all; each group has its prompt before its completions."""
        return tuple(self.ids[self.ends[n] : self.ends[n + 1]])

    def where(self, number: int) -> str:
        return f"{self.name}, row {number}"

    def take(self, number: int, tokens: Tokens) -> None:
        """Take in a row, or count why not."""
        found = read(self.rows[number], self.how, self.where(number))
        if isinstance(found, str):
            self.dropped[found] += 1
            return
        prompt = tokens.prompt(found.prompt)
        if len(prompt) > tokens.longest_prompt:
            self.dropped[LONG_PROMPT] += 1
            return
        try:
            written = [tokens.completion(found.prompt, prompt, content) for content in found.completions]
        except RebelError as wrong:
            raise RebelError(f"{self.where(number)}: {wrong}") from None
        fitting = [place for place, ids in enumerate(written) if tokens.fit(prompt, ids)]
        self.dropped[LONG] += len(written) - len(fitting)
        if len(fitting) >= 2 and comparable(found, fitting):
            self.append(number, fitting, [prompt, *(written[place] for place in fitting)])

    def append(self, number: int, places: Sequence[int], sequences: Sequence[Sequence[int]]) -> None:
        self.number.append(number)
        self.place.extend(places)
        self.first.append(len(self.place))
        for ids in sequences:
            self.ids.extend(ids)
            self.ends.append(len(self.ids))

    @property
    def hash(self) -> str:
        """A hash of all ids, prompts and completions apart: what log-probabilities of this data depend on."""
        total = hashlib.blake2b(digest_size=16)
        for numbers in (self.ids, self.ends, self.first):
            total.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
        return total.hexdigest()


def comparable(found: Recorded, places: Sequence[int]) -> bool:
    """Whether any two of these completions were compared, or will be."""
    if found.margins is None:
        return True
    chosen = torch.tensor(places)
    off = ~torch.eye(len(places), dtype=torch.bool)
    return bool(found.margins[chosen][:, chosen][off].isfinite().any())


def groups_of(rows: Table, numbers: Sequence[int], how: Reading, name: str, tokens: Tokens) -> Groups:
    """The usable groups of these rows."""
    groups = Groups(rows, how, name)
    for number in numbers:
        groups.take(number, tokens)
    if not len(groups):
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in groups.dropped.items() if count)
        raise RebelError(
            f"none of the {len(numbers):,} rows of {name} can be used: {reasons or 'there are no rows'}. What is "
            "longer than fits may need a larger --max_prompt_length or --max_completion_length"
        )
    return groups
