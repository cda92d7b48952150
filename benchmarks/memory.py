"""Peak memory of an update as the vocabulary and the group grow, at micro-batches of a fixed number of tokens.

    python benchmarks/memory.py

Bytes of tensors at their peak, weights and optimiser state apart, and where the vocabulary grows also apart from the
gradient of the output layer. A Llama of 2 layers and width 64; one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import story
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from rebel.learner import learner
from rebel.policies.causal_lm import causal_lm
from rebel.types import TokenTrace

RESULTS = Path(__file__).resolve().parent / "results" / "memory.json"
MIB = 2**20
WIDTH = 64


def peak(action: Callable[[], Any]) -> int:
    """Most bytes that tensors made by the action take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def update(group: int, completions: int, prompt: int, length: int, budget: int, vocabulary: int = 512) -> int:
    """Peak of one optimiser step on so many completions."""
    shape = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=vocabulary,
        eos_token_id=2,
    )
    mover = learner(
        Accelerator(cpu=True),
        causal_lm(LlamaForCausalLM(shape).eval(), story.load_tokenizer()),
        lambda weights: torch.optim.SGD(weights, lr=1e-3),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        budget=budget,
    )
    source = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 500, (count,), generator=source).tolist())

    groups = []
    for _ in range(completions // group):
        shared = ids(prompt)
        groups.append([TokenTrace(shared, ids(length)) for _ in range(group)])
    return peak(lambda: mover.update(groups, lambda places, logp: torch.ones_like(logp)))


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {"vocabulary": {}, "group": {}, "group, long prompts": {}}
    for words in (32_000, 64_000, 128_000, 256_000):
        whole = update(16, 32, prompt=32, length=96, budget=4096, vocabulary=words)
        found["vocabulary"][str(words)] = round((whole - 4 * WIDTH * words) / MIB, 1)
    for group in (2, 4, 8, 16, 32, 64):
        found["group"][str(group)] = round(update(group, 256, prompt=32, length=48, budget=4096) / MIB, 1)
        long = update(group, 256, prompt=256, length=64, budget=8192)
        found["group, long prompts"][str(group)] = round(long / MIB, 1)
    for what, row in found.items():
        print(f"{what}: " + ", ".join(f"{key} {value} MiB" for key, value in row.items()))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
