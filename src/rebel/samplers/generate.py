"""Completions drawn by the model that is trained, in this process.

A prompt is computed once for its whole group, and completions that have ended cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from rebel.policies.causal_lm import CausalLM
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
        batch = Prefilled.of(self.policy, prompts, group_size)
        completions: list[list[int]] = [[] for _ in range(len(prompts) * group_size)]
        ends = torch.tensor(sorted(self.policy.eos_ids), device=self.policy.device)
        rows = torch.arange(len(completions), device=self.policy.device)
        alive = torch.ones_like(rows, dtype=torch.bool)
        for position in range(self.max_new_tokens):
            tokens = choose(batch.logits, self.temperature, generator)
            for row, token, lives in zip(rows.tolist(), tokens.tolist(), alive.tolist(), strict=True):
                if lives:
                    completions[row].append(token)
            self.drawn(int(alive.sum()))
            alive = alive & ~torch.isin(tokens, ends)
            if not alive.any() or position + 1 == self.max_new_tokens:
                break
            if (~alive).sum() >= DROP_SHARE * len(alive):
                batch, tokens, rows, alive = batch.only(alive), tokens[alive], rows[alive], alive[alive]
            batch = batch.then(tokens)
        return completions


def choose(logits: Float[Tensor, "N V"], temperature: float, generator: torch.Generator) -> Int[Tensor, " N"]:
    """One token for each row, drawn from softmax(logits / temperature); the likeliest at temperature 0."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # by the inverse of the distribution function: one random number a row, where multinomial takes one a token
    heights = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)
    chance = torch.rand(len(logits), 1, generator=generator, device=logits.device) * heights[:, -1:]
    return torch.searchsorted(heights, chance, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Prefilled:
    """Sequences so far: their cache, the mask of what is no padding, and the logits of what comes next."""

    policy: CausalLM
    cache: DynamicCache
    mask: Int[Tensor, "N T"]
    logits: Float[Tensor, "N V"]

    @classmethod
    def of(cls, policy: CausalLM, prompts: Sequence[Sequence[int]], group_size: int) -> Prefilled:
        """The prompts, padded on the left and computed once, then repeated for each completion."""
        length = max(len(prompt) for prompt in prompts)
        padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        real = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids, mask = (torch.tensor(x, device=policy.device) for x in (padded, real))
        cache = DynamicCache(config=policy.bare.causal.config)
        logits = forward(policy, ids, mask, cache)
        cache.batch_repeat_interleave(group_size)
        return cls(policy, cache, mask.repeat_interleave(group_size, 0), logits.repeat_interleave(group_size, 0))

    def only(self, keep: Tensor) -> Prefilled:
        """These rows and no others."""
        self.cache.batch_select_indices(keep.nonzero()[:, 0])
        return Prefilled(self.policy, self.cache, self.mask[keep], self.logits[keep])

    def then(self, tokens: Int[Tensor, " N"]) -> Prefilled:
        """One token further."""
        mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        logits = forward(self.policy, tokens[:, None], mask, self.cache)
        return Prefilled(self.policy, self.cache, mask, logits)


def forward(
    policy: CausalLM, ids: Int[Tensor, "N T"], mask: Int[Tensor, "N L"], cache: DynamicCache
) -> Float[Tensor, "N V"]:
    """Logits of the next token, positions counted from the first token that is no padding."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = policy.model(
        input_ids=ids,
        attention_mask=None if mask.all() else mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
