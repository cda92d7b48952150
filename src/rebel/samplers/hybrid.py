"""Completions of the data beside those that the policy draws: one group, one reward, one regression."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rebel.data import is_messages, shuffled
from rebel.errors import RebelError
from rebel.policies.causal_lm import CausalLM
from rebel.types import DATA, Completion, Content, Prompt, Rollout, Sampler, TokenTrace


@dataclass(frozen=True)
class Hybrid:
    """Draws all but `count` completions of a group by `sampler`; the others are the data's own, of that prompt.

    Of more than `count` some are taken at random; where a prompt has fewer, its group is smaller.
    """

    sampler: Sampler
    beside: Callable[[Prompt], Sequence[Completion[TokenTrace]]]
    count: int

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout[TokenTrace]]:
        """The groups of `prompts`, in order. The same prompts and seed give the same completions."""
        for place, rollout in enumerate(self.sampler(prompts, group_size - self.count, seed)):
            others = self.beside(rollout.prompt)
            chosen = sorted(shuffled(len(others), seed, place)[: self.count])
            yield replace(rollout, completions=(*rollout.completions, *(others[k] for k in chosen)))

    def refresh(self) -> None:
        self.sampler.refresh()

    def close(self) -> None:
        self.sampler.close()


@dataclass(frozen=True)
class FromColumns:
    """The completions that a prompt's row has in these columns, in tokens; those longer than fit are left out."""

    policy: CausalLM
    columns: tuple[str, ...]
    longest: int

    def __call__(self, prompt: Prompt) -> list[Completion[TokenTrace]]:
        ids = self.policy.encode(prompt)
        found = []
        for column in self.columns:
            for content in self.contents(prompt, column):
                written = self.policy.recorded(prompt, ids, content)
                if len(written) <= self.longest:
                    found.append(Completion(content, TokenTrace(tuple(ids), tuple(written)), source=DATA))
        return found

    def contents(self, prompt: Prompt, column: str) -> list[Content]:
        """The contents of one column, in the form of the prompt: text, or messages."""
        if column not in prompt.meta:
            raise RebelError(f"--data_columns {column}: the data have only {', '.join(prompt.meta) or 'no column'}")
        given = prompt.meta[column]
        if given is None:
            return []
        items = given if isinstance(given, list) and not is_messages(given) else [given]
        return [self.in_form(prompt, item, column) for item in items if item]

    def in_form(self, prompt: Prompt, item: object, column: str) -> Content:
        if isinstance(item, str):
            return item if isinstance(prompt.content, str) else [{"role": "assistant", "content": item}]
        if isinstance(item, list) and is_messages(item) and not isinstance(prompt.content, str):
            own = item[len(prompt.content) :] if item[: len(prompt.content)] == prompt.content else item
            if own and all(message["role"] == "assistant" for message in own):
                return own
        raise RebelError(
            f"--data_columns {column}: {str(item)[:60]!r} is no answer to {str(prompt.content)[:60]!r}; give text, or "
            "for prompts of messages an assistant's messages"
        )
