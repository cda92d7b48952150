"""Seconds of a whole iteration and peak memory, beside TRL's trainers doing the same work, in alternation.

    python benchmarks/throughput.py                 all works, 5 pairs each
    python benchmarks/throughput.py --work story --pairs 3

Each measurement is a process of its own: it draws, scores and trains ITERATIONS times after one warm-up and reports
the median. REBEL and TRL take turns, and what is quoted is the ratio of each pair (TRL over REBEL, so more than 1 is
faster or smaller) as its median with the smallest and largest. The same reward, prompts, number of completions,
their length, optimiser and optimiser steps; random weights where a work has no real model. TRL's trainer is its
GRPOTrainer; for the works of pairs OnlineDPOTrainer (of `trl.experimental`), with a reference on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ITERATIONS = 3
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "throughput.jsonl"


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one iteration; hidden 0 is the real story model, beta above 0 needs a copy of it as the reference."""

    prompts: int
    group: int
    prompt_length: int
    completion_length: int
    steps: int = 1
    hidden: int = 0
    vocabulary: int = 512
    beta: float = 0.0
    peer: str = "grpo"


WORKS = {
    "story": Work(8, 8, 0, 64),
    "story-8-steps": Work(32, 8, 0, 64, steps=8),
    "8M-short": Work(8, 4, 32, 48, hidden=256, vocabulary=8192),
    "8M-long": Work(4, 8, 512, 64, hidden=256, vocabulary=8192),
    "8M-4-steps": Work(8, 8, 256, 64, steps=4, hidden=256, vocabulary=8192),
    "story-pairs": Work(32, 2, 0, 64, beta=0.1, peer="online_dpo"),
    "8M-pairs": Work(8, 2, 256, 64, hidden=256, vocabulary=8192, beta=0.1, peer="online_dpo"),
}


def model_and_prompts(work: Work, folder: Path) -> tuple[str, list[str]]:
    """A model folder and prompts of the work's length."""
    import story

    tokenizer = story.load_tokenizer()
    if not work.hidden:
        return str(story.folder("stories260K")), story.load_prompts(tokenizer)[1]
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=work.hidden,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=work.vocabulary,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(shape)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = tokenizer.decode(tokenizer(" ".join(story.load_prompts(tokenizer)[1]))["input_ids"][1:])
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    size = work.prompt_length - 1
    return str(folder), [tokenizer.decode(ids[k : k + size]) for k in range(0, min(len(ids), 60 * size), size)]


def reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """The share of the letter e: costs nothing and differs between completions."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def run_rebel(work: Work, model: str, prompts: list[str], folder: str) -> list[float]:
    """Seconds of each iteration."""
    from rebel import RebelConfig
    from rebel.build.job import build_job
    from rebel.build.model import build_model, build_tokenizer
    from rebel.build.rewards import build_reward
    from rebel.checkpoint import Progress
    from rebel.train import iterate
    from rebel.types import Prompt

    config = RebelConfig(
        model_name_or_path=model,
        output_dir=folder,
        eta=1.0,
        beta=work.beta,
        average=0.0,
        num_generations=work.group,
        prompts_per_iteration=work.prompts,
        steps_per_iteration=work.steps,
        num_iterations=1,
        max_completion_length=work.completion_length,
        max_prompt_length=1024,
        iterations=ITERATIONS + 1,
        learning_rate=1e-6,
        track_kl=False,
        eval_prompts=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    rewards = partial(build_reward, config, rewards=[reward])
    job = build_job(config, build_model(config), build_tokenizer(config), rewards, ([Prompt(p) for p in prompts], []))
    progress, seconds = Progress(), []
    for _ in range(ITERATIONS + 1):
        began = time.perf_counter()
        iterate(job.run, progress)
        seconds.append(time.perf_counter() - began)
    return seconds


def run_trl(work: Work, model: str, prompts: list[str], folder: str) -> list[float]:
    """Seconds of each iteration, between the ends of its last optimiser steps."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % work.steps == 0:
                self.times.append(time.perf_counter())

    clock = Clock()
    trainer, arguments = {"grpo": grpo, "online_dpo": online_dpo}[work.peer](work, folder)
    trainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
    ).train()
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def shared_arguments(work: Work, folder: str) -> dict[str, Any]:
    """What both of TRL's trainers are told."""
    return {
        "output_dir": folder,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_steps": (ITERATIONS + 1) * work.steps,
        "beta": work.beta,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def grpo(work: Work, folder: str) -> tuple[Any, Any]:
    """TRL's GRPOTrainer."""
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer, GRPOConfig(
        **shared_arguments(work, folder),
        per_device_train_batch_size=work.prompts * work.group // work.steps,
        steps_per_generation=work.steps,
        num_generations=work.group,
        max_completion_length=work.completion_length,
    )


def online_dpo(work: Work, folder: str) -> tuple[Any, Any]:
    """TRL's OnlineDPOTrainer, which draws two completions of each prompt and has a reference."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    return OnlineDPOTrainer, OnlineDPOConfig(
        **shared_arguments(work, folder),
        per_device_train_batch_size=work.prompts,
        max_new_tokens=work.completion_length,
        max_length=work.prompt_length + work.completion_length + 256,
        top_k=0,
    )


def worker(name: str, who: str) -> None:
    """One measurement, as a line of JSON."""
    work = WORKS[name]
    with TemporaryDirectory() as folder:
        model, prompts = model_and_prompts(work, Path(folder) / "model")
        seconds = {"rebel": run_rebel, "trl": run_trl}[who](work, model, prompts, folder)[1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"seconds": statistics.median(seconds), "peak_mib": peak}))


def measure(name: str, who: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--work", name, "--worker", who]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{who} on {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def compare(name: str, pairs: int) -> dict[str, Any]:
    """Ratios TRL / REBEL of seconds and of peak memory, pair by pair."""
    rows = [{who: measure(name, who) for who in (("rebel", "trl"), ("trl", "rebel"))[k % 2]} for k in range(pairs)]

    def ratios(key: str) -> list[float]:
        values = sorted(row["trl"][key] / row["rebel"][key] for row in rows)
        return [round(v, 2) for v in (statistics.median(values), values[0], values[-1])]

    own = statistics.median(row["rebel"]["seconds"] for row in rows)
    found = {"work": name, "seconds": ratios("seconds"), "peak": ratios("peak_mib"), "rebel_seconds": round(own, 2)}
    found["rebel_peak_mib"] = round(statistics.median(row["rebel"]["peak_mib"] for row in rows))
    return found | {"pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WORKS, action="append")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--worker", choices=["rebel", "trl"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.work[0], given.worker)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    print("| work | seconds: TRL / REBEL | peak memory: TRL / REBEL | REBEL seconds | REBEL MiB |")
    print("| --- | --- | --- | --- | --- |")
    for name in given.work or WORKS:
        row = compare(name, given.pairs)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        seconds, peak = (f"{m} ({low} to {high})" for m, low, high in (row["seconds"], row["peak"]))
        print(f"| {name} | {seconds} | {peak} | {row['rebel_seconds']} | {row['rebel_peak_mib']} |", flush=True)


if __name__ == "__main__":
    main()
