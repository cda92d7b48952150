"""How well a stated KL is kept: KL(pi_{t+1} || pi_t) of every iteration, measured on fresh completions.

    python benchmarks/kl_control.py story        # the pretrained story model, sentiment
    python benchmarks/kl_control.py arithmetic   # the quickstart's model, exact match

After each iteration a completion of each of 2,048 prompts is drawn from the new policy and scored by it and by the
policy before, whose weights were kept aside. Nothing of this reaches the training. Prints the share of the iterations
after the fifth whose KL is within 25% of the goal.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import story
import torch
from ours import Settings, job

from rebel.build.job import Job
from rebel.checkpoint import Progress
from rebel.collect import Online
from rebel.data import seed_of
from rebel.job import prepare
from rebel.policies.causal_lm import CausalLM
from rebel.policies.rows import padded
from rebel.tasks import arithmetic
from rebel.train import iterate
from rebel.types import TokenTrace

GOAL = 0.1
FRESH_PROMPTS = 2048


def story_job(seed: int, iterations: int, folder: str) -> Job:
    settings = Settings(prompts=32, kl_per_iteration=GOAL, samples=32 * 8 * iterations)
    return job(settings, seed, folder)[0]


def arithmetic_job(seed: int, iterations: int, folder: str) -> Job:
    arithmetic.prepare(arithmetic.problems(seed), Path(folder), arithmetic.RECIPE, seed)
    changes = {"kl_per_iteration": GOAL, "prompts_per_iteration": 2048, "num_generations": 2, "learning_rate": 2e-4}
    quiet = {"iterations": iterations, "eval_prompts": 0, "disable_tqdm": True}
    return prepare(replace(arithmetic.settings(Path(folder), seed), **changes, **quiet))


def measured_kl(ready: Job, before: list[torch.Tensor], seed: int) -> float:
    """KL(pi_{t+1} || pi_t) in nats per completion: at every token of completions drawn from pi_{t+1}, the KL of the
    next token's whole distribution. Unbiased, and far less noisy than log-ratios of what was drawn."""
    learner, collector = ready.run.learner, ready.run.collector
    assert isinstance(collector, Online)
    source = collector.source
    prompts = source.stream.take(seed_of(seed) % 100_000, FRESH_PROMPTS)
    traces = [trace for group in source.sampler(prompts, 1, seed) for trace in group.traces]
    now = [next_tokens(ready, traces[k : k + 64]) for k in range(0, len(traces), 64)]
    kept = [weight.detach().clone() for weight in learner.weights]
    replace_weights(learner.weights, before)
    then = [next_tokens(ready, traces[k : k + 64]) for k in range(0, len(traces), 64)]
    replace_weights(learner.weights, kept)
    return sum(float((a.exp() * (a - b)).sum()) for a, b in zip(now, then, strict=True)) / len(traces)


@torch.no_grad()
def next_tokens(ready: Job, traces: list[TokenTrace]) -> torch.Tensor:
    """log-probabilities of every next token, at every place of the completions."""
    policy = ready.run.learner.policy
    assert isinstance(policy, CausalLM)
    ids, written = padded(traces, policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits[written[:, 1:]].log_softmax(dim=-1)


@torch.no_grad()
def replace_weights(weights: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for weight, other in zip(weights, others, strict=True):
        weight.copy_(other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["story", "arithmetic"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    build = {"story": story_job, "arithmetic": arithmetic_job}[given.task]
    found, progress = [], Progress()
    with TemporaryDirectory() as folder:
        ready = build(given.seed, given.iterations, folder)
        while progress.iteration < given.iterations:
            before = [weight.detach().clone() for weight in ready.run.learner.weights]
            row = iterate(ready.run, progress)
            found.append(measured_kl(ready, before, seed_of(given.seed, progress.iteration)))
            line = f"{progress.iteration:3d}  KL {found[-1]:.3f}  scale {row['scale']:.2f}  reward {row['reward']:.3f}"
            print(line, flush=True)
    late = found[5:]
    share = sum(abs(kl / GOAL - 1) <= 0.25 for kl in late) / len(late)
    result = {"task": given.task, "seed": given.seed, "goal": GOAL, "within_25_percent": share, "kl": found}
    with (story.RESULTS / "kl_control.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{share:.0%} of {len(late)} iterations within 25% of {GOAL} nats")


if __name__ == "__main__":
    main()
