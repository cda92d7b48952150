"""REBEL on the task of story.py, in the format of peers.py.

    python benchmarks/ours.py run --learning_rate 1e-4 --seed 1
    python benchmarks/ours.py grid

A row with eta = 1e6 has the regression switched off: what is left is RLOO's gradient, taken several times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import story
import torch
from transformers.utils import logging

from rebel import RebelConfig
from rebel.build.job import Job, build_job
from rebel.build.model import build_model, build_tokenizer
from rebel.build.rewards import build_reward
from rebel.checkpoint import Progress
from rebel.policies.causal_lm import CausalLM
from rebel.train import iterate
from rebel.types import Prompt

MILESTONES = (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 1280, 2560, 5120)


@dataclass(frozen=True, slots=True)
class Settings:
    """One run of REBEL, apart from its seed. An iteration draws prompts x group completions."""

    task: str = "sentiment"
    scale_rewards: str = "none"
    learning_rate: float = 1e-4
    prompts: int = 8
    group: int = 8
    steps: int = 8
    passes: int = RebelConfig().passes
    beta: float = 0.0
    eta: float | str = "auto"
    kl_per_iteration: float | None = RebelConfig.kl_per_iteration
    average: float = 0.0
    credit: str = RebelConfig.credit
    max_grad_norm: float = RebelConfig.max_grad_norm
    samples: int = 1280

    @property
    def per_iteration(self) -> int:
        return self.prompts * self.group


def config(settings: Settings, seed: int, folder: str) -> RebelConfig:
    """The same work as a peer's, in the settings of REBEL."""
    return RebelConfig(
        model_name_or_path=str(story.folder("stories260K")),
        output_dir=folder,
        seed=seed,
        eta=settings.eta,
        kl_per_iteration=settings.kl_per_iteration,
        beta=settings.beta,
        average=settings.average,
        credit=settings.credit,  # pyright: ignore[reportArgumentType]
        max_grad_norm=settings.max_grad_norm,
        scale_rewards=settings.scale_rewards,
        learning_rate=settings.learning_rate,
        num_generations=settings.group,
        prompts_per_iteration=settings.prompts,
        steps_per_iteration=settings.steps,
        num_iterations=settings.passes,
        iterations=-(-settings.samples // settings.per_iteration),
        max_completion_length=story.MAX_NEW_TOKENS,
        track_kl=False,
        use_cpu=True,
        eval_prompts=0,
        disable_tqdm=True,
    )


def job(settings: Settings, seed: int, folder: str) -> tuple[Job, list[str]]:
    """A run that is ready to start, and the held-out prompts."""
    logging.disable_progress_bar()
    resolved = config(settings, seed, folder)
    tokenizer = build_tokenizer(resolved)
    held_out, train = story.load_prompts(tokenizer)
    reward = partial(build_reward, resolved, rewards=[story.REWARDS[settings.task]])
    prompts = [Prompt(text) for text in train], []
    return build_job(resolved, build_model(resolved), tokenizer, reward, prompts), held_out


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Train and evaluate REBEL once; the row for the results file."""
    with TemporaryDirectory() as folder:
        ready, held_out = job(settings, seed, folder)
        begin, begin_cpu, aside = time.perf_counter(), time.process_time(), 0.0
        points, progress, rows = [], Progress(), []
        while progress.iteration < ready.iterations:
            rows.append(iterate(ready.run, progress))
            if progress.samples in milestones(settings):
                started = time.perf_counter()
                points.append(
                    {"samples": progress.samples, "steps": progress.step}
                    | evaluate(ready, held_out, settings.task, seed)
                )
                aside += time.perf_counter() - started
    seconds = time.perf_counter() - begin
    return identity(settings, seed) | {
        "curve": points,
        "iterations": [{k: row.get(k) for k in ("eta", "kl_iteration", "r2_held_out", "reward")} for row in rows],
        "seconds": {"training": round(seconds - aside, 1), "evaluation": round(aside, 1)},
        "cpu_seconds": round(time.process_time() - begin_cpu, 1),
    }


def evaluate(ready: Job, held_out: list[str], task: str, seed: int) -> dict[str, float]:
    """The peers' own evaluation, of the averaged iterate if one is kept."""
    learner = ready.run.learner
    policy = learner.policy
    assert isinstance(policy, CausalLM)
    with learner.use_average():
        return asdict(story.evaluate(policy.model, policy.tokenizer, held_out, story.REWARDS[task], seed=seed))


def milestones(settings: Settings) -> tuple[int, ...]:
    """Where a run is evaluated: more often where the KL moves fast."""
    return MILESTONES[-3:] if settings.beta else MILESTONES


def identity(settings: Settings, seed: int) -> dict[str, Any]:
    """What tells a run from all others."""
    named = asdict(settings)
    return {"method": "rebel", "task": named.pop("task"), "settings": named, "seed": seed}


def run_once(settings: Settings, seed: int) -> dict[str, Any]:
    """The row of this run: from the results file, or run now and added to it."""
    done = story.finished_run(story.read_runs(), **identity(settings, seed))
    if done:
        return dict(done)
    row = run(settings, seed)
    story.add_run(row)
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    """One line for the log."""
    s = row["settings"]
    points = "  ".join(f"{p['samples']}: {p['reward']:.3f} at {p['kl']:.2f}" for p in row["curve"])
    names = f"rebel {row['task']} eta {s['eta']} lr {s['learning_rate']:g} average {s['average']}"
    batch = f"{s['prompts']}x{s['group']}/{s['steps']}x{s['passes']} beta {s['beta']:g}"
    print(f"{names} {batch} seed {row['seed']}  {points}  {row['cpu_seconds']} CPU seconds", flush=True)


FREE = Settings(prompts=8, samples=640, learning_rate=5e-5)
"""Without a KL term: 8 prompts x 8 completions an iteration, 8 steps a pass."""
PRICED = Settings(prompts=32, samples=5120, beta=0.05, average=0.3, learning_rate=3e-5)
"""With a KL term: 32 prompts x 8 completions an iteration, 8 steps a pass."""
SEEDS = (1, 2, 3, 4, 5)
OFF = 1e6


def grid() -> Iterator[tuple[Settings, int]]:
    """Every run of the comparison, the most telling ones first; a stopped grid goes on where it was."""
    for credit in (RebelConfig.credit, "trajectory"):
        priced, free = replace(PRICED, credit=credit), replace(FREE, credit=credit)
        yield from ((priced, seed) for seed in SEEDS)
        yield from ((free, seed) for seed in SEEDS)
        yield from ((replace(free, eta=OFF), seed) for seed in SEEDS)
        yield from ((replace(priced, eta=OFF), seed) for seed in SEEDS[:2])
        yield from ((replace(free, task="word_length"), seed) for seed in SEEDS[:3])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "grid"])
    parser.add_argument("--seed", type=int, default=1)
    for name, default in asdict(Settings()).items():
        kind = float if default is None else type(default)
        kind = kind if name != "eta" else lambda text: text if text == "auto" else float(text)
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    given = vars(parse())
    if given.pop("what") == "grid":
        for settings, seed in grid():
            run_once(settings, seed)
        return
    seed = given.pop("seed")
    run_once(Settings(**given), seed)


if __name__ == "__main__":
    main()
