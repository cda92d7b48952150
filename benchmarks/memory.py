"""Peak memory of an update as the vocabulary and the group grow, at micro-batches of a fixed number of tokens.

    python benchmarks/memory.py

Bytes of tensors at their peak, weights and optimiser state apart, and where the vocabulary grows also apart from the
gradient of the output layer. A Llama of 2 layers and width 64; one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import story
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from rebel.learner import learner
from rebel.micro_batches import plan
from rebel.policies.causal_lm import causal_lm
from rebel.types import TokenTrace

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
MIB = 2**20
WIDTH = 64
GROUPS = (2, 4, 8, 16, 32, 64)
COMPLETIONS = 1024
LINES = {
    "group": (32, (48, 48), 9_700),
    "group, long prompts": (256, (64, 64), 16_500),
    "group, ragged": (32, (16, 80), 9_700),
}
"""Tokens of a prompt, shortest and longest completion, and tokens of a micro-batch, which groups of each size fill."""


def peak(action: Callable[[], Any]) -> int:
    """Most bytes that tensors made by the action take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    events: list[Any] = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@dataclass(frozen=True, slots=True)
class Work:
    """Completions in groups, prompts and completions of some lengths, and the tokens of a micro-batch."""

    group: int
    completions: int
    prompt: int
    length: tuple[int, int]
    budget: int
    vocabulary: int = 512


@dataclass(frozen=True, slots=True)
class Found:
    """Peak, and of the fullest micro-batch the tokens it counts as, those that are in it, and its completions."""

    mib: float
    cost: int
    tokens: int
    completions: int


def groups_of(work: Work) -> list[list[TokenTrace]]:
    source = torch.Generator().manual_seed(0)

    def ids(shortest: int, longest: int) -> tuple[int, ...]:
        count = int(torch.randint(shortest, longest + 1, (), generator=source))
        return tuple(torch.randint(3, 500, (count,), generator=source).tolist())

    prompts = [ids(work.prompt, work.prompt) for _ in range(work.completions // work.group)]
    return [[TokenTrace(prompt, ids(*work.length)) for _ in range(work.group)] for prompt in prompts]


def update(work: Work) -> Found:
    """Peak of one optimiser step."""
    shape = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=work.vocabulary,
        eos_token_id=2,
    )
    policy = causal_lm(LlamaForCausalLM(shape).eval(), story.load_tokenizer())
    mover = learner(
        Accelerator(cpu=True),
        policy,
        lambda weights: torch.optim.SGD(weights, lr=1e-3),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        budget=work.budget,
    )
    groups = groups_of(work)
    traces = [trace for group in groups for trace in group]
    pieces = [[traces[i] for i in piece.traces] for piece in plan(groups, policy.cost, work.budget)]
    fullest = max(pieces, key=policy.cost)
    most = peak(lambda: mover.update(groups, lambda places, logp: torch.ones_like(logp))) / MIB
    return Found(round(most, 1), policy.cost(fullest), policy.layout.load(fullest).tokens, len(fullest))


def flat(found: dict[str, Found]) -> float:
    """Largest over smallest."""
    peaks = [row.mib for row in found.values()]
    return max(peaks) / min(peaks)


def main() -> None:
    torch.set_num_threads(1)
    words = {str(v): update(Work(16, 32, 32, (96, 96), 9_700, v)) for v in (32_000, 64_000, 128_000, 256_000)}
    found = {
        # apart from the gradient of the output layer
        "vocabulary": {v: replace(row, mib=round(row.mib - 4 * WIDTH * int(v) / MIB, 1)) for v, row in words.items()}
    }
    for name, (prompt, length, budget) in LINES.items():
        found[name] = {str(g): update(Work(g, COMPLETIONS, prompt, length, budget)) for g in GROUPS}
    for name, line in found.items():
        print(f"{name}: largest over smallest {flat(line):.2f}")
        for key, row in line.items():
            inside = f"{row.tokens} in {row.completions} completions"
            print(f"  {key:>6} {row.mib:6.1f} MiB, counted as {row.cost} tokens, {inside}")
    rows = {name: {key: asdict(row) for key, row in line.items()} for name, line in found.items()}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
