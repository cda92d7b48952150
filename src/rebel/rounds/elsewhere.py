"""Rollouts that another program drew: rows of a prompt with its completions, as text and, where known, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from rebel.data import is_messages
from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM
from rebel.types import Completion, Prompt, Rollout, TokenTrace

COLUMNS = ("prompt", "completions", "prompt_ids", "completion_ids", "finished", "source")
"""What a row may say of its rollout; all its other columns are those of the prompt."""


@dataclass(frozen=True, slots=True)
class DrawnElsewhere:
    """The rows of a file as rollouts of this policy's tokens, of which each has at most `longest`."""

    rows: Dataset | Sequence[Mapping[str, Any]]
    policy: CausalLM
    name: str
    longest_prompt: int
    longest: int

    def usable(self) -> tuple[list[int], int, int]:
        """The rows to take, how many are left out as too long, and how many as fewer than two completions."""
        fits, long, few = [], 0, 0
        for number in range(len(self.rows)):
            rollout = self.rollout(number)
            traces = rollout.traces
            if len(traces) < 2:
                few += 1
            elif len(traces[0].prompt) > self.longest_prompt or max(map(len, traces)) > self.longest:
                long += 1
            else:
                fits.append(number)
        if not fits:
            raise RebelError(
                f"{self.name} has no row to take: {long} are longer than --max_prompt_length {self.longest_prompt} "
                f"or the model's {self.longest} positions, {few} have fewer than two completions"
            )
        return fits, long, few

    def rollout(self, number: int) -> Rollout[TokenTrace]:
        """One row. Ids that are given are kept as they are; text is encoded, and ends where it says that it does."""
        every: Any = self.rows  # datasets says of its rows no more than that they may be mappings
        row, where = every[number], f"{self.name}, row {number}"
        content, texts = row.get("prompt"), row.get("completions")
        if not (isinstance(content, str) and content.strip()) and not (content and is_messages(content)):
            raise RebelError(f"{where}: the column prompt must be text or a list of messages with role and content")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RebelError(f"{where}: the column completions must be a list of texts")
        prompt = Prompt(content, {k: v for k, v in row.items() if k not in COLUMNS})
        start = tuple(row.get("prompt_ids") or self.policy.encode(prompt))
        given = self.each(row, "completion_ids", texts, where)
        ended = self.each(row, "finished", texts, where)
        sources = self.each(row, "source", texts, where)
        return Rollout(
            prompt,
            tuple(
                self.completion(prompt, start, text, ids, end, source or "other")
                for text, ids, end, source in zip(texts, given, ended, sources, strict=True)
            ),
        )

    def each(self, row: Mapping[str, Any], name: str, texts: Sequence[str], where: str) -> Sequence[Any]:
        """What a column says of each completion: one value for all of them, or a list."""
        value = row.get(name)
        if not isinstance(value, list):
            return [value] * len(texts)
        if len(value) != len(texts):
            raise RebelError(f"{where}: the column {name} has {len(value)} entries for {len(texts)} completions")
        return value

    def completion(
        self,
        prompt: Prompt,
        start: tuple[int, ...],
        text: str,
        ids: Sequence[int] | None,
        end: bool | None,
        source: str,
    ) -> Completion[TokenTrace]:
        """Without a word on it, text is finished, and ids are if they end with an end of sequence."""
        ends = self.policy.eos_ids
        if ids is None:
            end_token: Any = self.policy.tokenizer.eos_token_id
            own = list(self.policy.tokenizer(text, add_special_tokens=False).input_ids)
            if end is not False and not (own and own[-1] in ends):
                own.append(end_token)
        else:
            own = list(ids)
        content = text if isinstance(prompt.content, str) else [{"role": "assistant", "content": text}]
        finished = bool(own) and own[-1] in ends if end is None else end
        return Completion(content, TokenTrace(start, tuple(own)), source, finished)
