"""Completions drawn by the model that is trained, in this process.

A prompt is computed once for its whole group, and completions that have ended cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rebel.policies.causal_lm import CausalLM
from rebel.samplers.prefilled import Prefilled
from rebel.types import Prompt, Rollout, TokenTrace

DROP_SHARE = 0.125
"""Ended completions are taken out of the batch once they are this share of it: copying the cache has a price too."""


@dataclass(frozen=True)
class Generate:
    """Draws from the policy at `temperature` (0 is greedy), token by token, with a cache.

    `drawn` is told the number of tokens of every step, for a progress bar.
    """

    policy: CausalLM
    max_new_tokens: int
    temperature: float
    precision: Callable[[], AbstractContextManager] = nullcontext
    drawn: Callable[[int], None] = lambda tokens: None

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout[TokenTrace]]:
        """The groups of `prompts`, in order. The same prompts and seed give the same completions."""
        encoded = [self.policy.encode(prompt) for prompt in prompts]
        with torch.inference_mode(), self.precision():
            completions = self.draw(encoded, group_size, seed)
        for index, prompt in enumerate(prompts):
            group = completions[index * group_size : (index + 1) * group_size]
            yield Rollout(prompt, tuple(self.policy.completion(prompt, encoded[index], ids) for ids in group))

    def refresh(self) -> None:
        """Nothing to do: it samples from the weights that are trained."""

    def close(self) -> None:
        """Nothing to do: it holds nothing."""

    def draw(self, prompts: Sequence[Sequence[int]], group_size: int, seed: int) -> list[list[int]]:
        """Token ids of `group_size` completions of each prompt, ends of sequence included."""
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        batch = Prefilled.of(self.policy, prompts, group_size, self.max_new_tokens)
        written = Written.of(len(prompts) * group_size, self.max_new_tokens, self.policy.device)
        ends = torch.tensor(sorted(self.policy.eos_ids), device=self.policy.device)
        alive = torch.ones_like(written.rows, dtype=torch.bool)
        living = len(alive)
        for position in range(self.max_new_tokens):
            tokens = choose(batch.logits, self.temperature, generator)
            written.take(tokens, alive, position)
            self.drawn(living)
            alive = alive & ~torch.isin(tokens, ends)
            living = int(alive.sum())  # a GPU is waited for once a token, here
            if not living or position + 1 == self.max_new_tokens:
                break
            if len(alive) - living >= DROP_SHARE * len(alive):
                batch, written, tokens, alive = batch.only(alive), written.only(alive), tokens[alive], alive[alive]
            batch = batch.then(tokens)
        return written.completions()


def choose(logits: Float[Tensor, "N V"], temperature: float, generator: torch.Generator) -> Int[Tensor, " N"]:
    """One token for each row, drawn from softmax(logits / temperature); the likeliest at temperature 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # by the inverse of the distribution function: one random number a row, where multinomial takes one a token
    heights = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    chance = torch.rand(len(logits), 1, generator=generator, device=logits.device) * heights[:, -1:]
    return torch.searchsorted(heights, chance, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Written:
    """What has been drawn so far, and which completions the rows of the batch are."""

    ids: Int[Tensor, "N C"]
    lengths: Int[Tensor, " N"]
    rows: Int[Tensor, " A"]

    @classmethod
    def of(cls, completions: int, tokens: int, device: torch.device) -> Written:
        """Nothing yet."""
        rows = torch.arange(completions, device=device)
        return cls(torch.zeros(completions, tokens, dtype=torch.long, device=device), torch.zeros_like(rows), rows)

    def take(self, tokens: Int[Tensor, " A"], alive: Bool[Tensor, " A"], position: int) -> None:
        """One more token of every completion that has not ended."""
        self.ids[self.rows, position] = tokens
        self.lengths[self.rows] += alive

    def only(self, alive: Bool[Tensor, " A"]) -> Written:
        """The batch has these rows left."""
        return Written(self.ids, self.lengths, self.rows[alive])

    def completions(self) -> list[list[int]]:
        """Token ids, up to and with the end of sequence."""
        return [ids[:length] for ids, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)]
