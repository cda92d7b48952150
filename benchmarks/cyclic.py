"""Preferences that go round in a circle, on the story model: REBEL's mixture, its last iterate, and offline DPO.

    python benchmarks/cyclic.py run --seed 1       one seed, added to results/cyclic.jsonl
    python benchmarks/cyclic.py table              results/cyclic.json and results/cyclic.md

A story is drawn to its 40th token. Its last ten words are its ending, which is "glad" if it has a word of joy, else
"day" if it tells of a day, else "plain". The judge prefers glad to day, day to plain and plain to glad; of two endings
of one style it prefers neither. No reward says so, and whoever stays with one style loses every comparison to another:
the best policy is a third of each. The initial policy has 29, 20 and 51%.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import story
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from rebel import RebelConfig
from rebel.build.job import Job, build_job
from rebel.build.model import build_model, build_tokenizer
from rebel.build.rewards import build_reward
from rebel.checkpoint import Progress
from rebel.collect import Online
from rebel.data import seed_of
from rebel.evaluators import ByReward
from rebel.iterates import put
from rebel.train import iterate
from rebel.types import Prompt

STYLES = ("glad", "day", "plain")
ENDING = 10
JOY = r"\b(happy|fun|loved?|liked?|friends?|play(ed|ing)?|smiled?|laughed)\b"
RUNS = story.RESULTS / "cyclic.jsonl"
ITERATIONS, PROMPTS, GROUP, TOKENS = 120, 16, 8, 40
PER_PROMPT = 8
"""Completions of each held-out prompt in an evaluation."""


def style(text: str) -> str:
    """What the judge sees of a story: its last words."""
    ending = " ".join(text.lower().split()[-ENDING:])
    if re.search(JOY, ending):
        return "glad"
    return "day" if re.search(r"\bday\b", ending) else "plain"


def judge(
    first: Sequence[str], second: Sequence[str], log_metric: Callable = lambda *said: None, **columns: Any
) -> list[float]:
    """P(first > second): each style beats the next one in the circle. Notes the shares of what it has seen."""
    for name, share in shares([*{*first, *second}]).items():
        log_metric(f"style/{name}", share)
    places = [(STYLES.index(style(a)), STYLES.index(style(b))) for a, b in zip(first, second, strict=True)]
    return [(0.5, 1.0, 0.0)[(b - a) % 3] for a, b in places]


def shares(texts: Sequence[str]) -> dict[str, float]:
    """The share of each style."""
    found = [style(text) for text in texts]
    return {name: found.count(name) / len(found) for name in STYLES}


def exploitability(of: Mapping[str, float]) -> float:
    """How much more than half of the comparisons the best answer to this policy wins: its worst case."""
    wins = [of[STYLES[(k + 1) % 3]] + of[STYLES[k]] / 2 for k in range(3)]
    return max(wins) - 0.5


def config(arguments: argparse.Namespace, folder: str) -> RebelConfig:
    return RebelConfig(
        model_name_or_path=str(story.folder("stories260K")),
        judge=f"{__file__}:judge",
        judge_swap=False,  # it is the same both ways
        output_dir=folder,
        seed=arguments.seed,
        eta=arguments.eta,
        adam_beta1=arguments.adam_beta1,
        learning_rate=arguments.learning_rate,
        num_generations=GROUP,
        prompts_per_iteration=PROMPTS,
        steps_per_iteration=4,
        num_iterations=arguments.passes,
        iterations=arguments.iterations,
        mixture=arguments.iterations,
        max_completion_length=TOKENS,
        track_kl=False,
        use_cpu=True,
        eval_prompts=story.HELD_OUT,
        disable_tqdm=True,
    )


def job(arguments: argparse.Namespace, folder: str) -> Job:
    """A run of REBEL that is ready to start."""
    settings = config(arguments, folder)
    tokenizer = build_tokenizer(settings)
    held_out, train = story.load_prompts(tokenizer)
    prompts = [Prompt(text) for text in train], [Prompt(text) for text in held_out]
    return build_job(settings, build_model(settings), tokenizer, partial(build_reward, settings), prompts)


def rebel(arguments: argparse.Namespace) -> dict[str, Any]:
    """Styles along the way, and at the end of the mixture, of the averaged weights and of the last iterate."""
    with TemporaryDirectory() as folder:
        ready = job(arguments, folder)
        run, progress, way = ready.run, Progress(), []
        while progress.iteration < ready.iterations:
            metrics = iterate(run, progress)
            run.hooks.iterated(progress)
            noted = ready.recorder.noted()
            way.append({name: noted[f"style/{name}"] for name in STYLES})
            print(progress.iteration, rounded(way[-1]), f"R2 {metrics['r2_held_out']:.2f}", flush=True)
        iterates = ready.recorder.iterates
        collector, evaluator = run.collector, run.evaluator
        assert isinstance(collector, Online) and isinstance(evaluator, ByReward)
        last, mixture, prompts = collector.source.sampler, evaluator.source.sampler, evaluator.prompts
        found = {
            "mixture": drawn(mixture, prompts, PER_PROMPT, arguments.seed),
            "last": drawn(last, prompts, PER_PROMPT, arguments.seed),
        }
        files = [load_file(path) for path in iterates.stored()]
        put(iterates.weights, {name: sum(file[name] for file in files) / len(files) for name in files[0]})
        found["averaged weights"] = drawn(last, prompts, PER_PROMPT, arguments.seed)
    return {"way": way, "iterates": len(files), **{f"REBEL, {name}": shares(texts) for name, texts in found.items()}}


def drawn(sampler: Any, prompts: Sequence[Prompt], count: int, seed: int) -> list[str]:
    return [c.content for rollout in sampler(prompts, count, seed_of(seed, 99)) for c in rollout.completions]


def dpo(arguments: argparse.Namespace) -> dict[str, Any]:
    """Styles after TRL's DPO on one fixed set: as many completions of the initial policy as REBEL drew, in pairs."""
    tokenizer = story.load_tokenizer()
    held_out, train = story.load_prompts(tokenizer)
    model, pairs = story.load_policy(), fixed_pairs(tokenizer, train, arguments)
    with TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            beta=arguments.dpo_beta,
            learning_rate=arguments.dpo_learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=16,
            num_train_epochs=arguments.dpo_epochs,
            max_length=256,
            seed=arguments.seed,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
        trainer.train()
    draws = story.draw(model.eval(), tokenizer, held_out, PER_PROMPT, seed=arguments.seed)
    return {"pairs": len(pairs), "steps": trainer.state.global_step, "DPO": shares([draw.text for draw in draws])}


def fixed_pairs(tokenizer: Any, prompts: Sequence[str], arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Pairs of the initial policy's completions as the judge orders them; ties are no pairs."""
    wanted = arguments.iterations * PROMPTS * GROUP
    each = 2 * -(-wanted // (2 * len(prompts)))
    draws = []
    for start in range(0, len(prompts), 64):
        draws += story.draw(
            story.initial_policy(),
            tokenizer,
            prompts[start : start + 64],
            each,
            seed=seed_of(arguments.seed, start) % 2**31,
        )
    rows = []
    for one, other in zip(draws[:wanted:2], draws[1:wanted:2], strict=True):
        (p,) = judge([one.text], [other.text])
        if p != 0.5:
            chosen, rejected = (one, other) if p > 0.5 else (other, one)
            rows.append({"prompt": one.prompt, "chosen": " " + chosen.text, "rejected": " " + rejected.text})
    return rows


def initial(seed: int) -> dict[str, float]:
    tokenizer = story.load_tokenizer()
    held_out, _ = story.load_prompts(tokenizer)
    return shares([d.text for d in story.draw(story.initial_policy(), tokenizer, held_out, PER_PROMPT, seed=seed)])


def run(arguments: argparse.Namespace) -> None:
    begin = time.process_time()
    row: dict[str, Any] = {"settings": {k: v for k, v in vars(arguments).items() if k not in ("what", "seed", "only")}}
    row |= {"seed": arguments.seed, "initial": initial(arguments.seed)}
    if arguments.only != "dpo":
        row |= rebel(arguments)
    if arguments.only != "rebel":
        row |= dpo(arguments)
    row["cpu_seconds"] = round(time.process_time() - begin)
    print(json.dumps({k: rounded(v) if isinstance(v, dict) else v for k, v in row.items() if k != "way"}))
    story.add_run(row, RUNS)


def merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each seed that has all of it, whether or not the methods ran one by one."""
    seeds: dict[int, dict[str, Any]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], {}).update(row)
    return [seeds[seed] for seed in sorted(seeds) if all(name in seeds[seed] for name in ROWS)]


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


ROWS = ("initial", "REBEL, mixture", "REBEL, last", "REBEL, averaged weights", "DPO")


def table() -> None:
    """Means over the seeds with their range, as JSON and as a table."""
    runs = merged(story.read_runs(RUNS))
    result: dict[str, Any] = {"seeds": [r["seed"] for r in runs], "settings": runs[0]["settings"], "rows": {}}
    lines = ["| policy | " + " | ".join(STYLES) + " | exploitability |", "| --- | --- | --- | --- | --- |"]
    for name in ROWS:
        found = [r[name] for r in runs]
        columns = {s: [of[s] for of in found] for s in STYLES} | {
            "exploitability": [exploitability(of) for of in found]
        }
        result["rows"][name] = {key: [round(v, 4) for v in values] for key, values in columns.items()}
        cells = [f"{statistics.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    result["way"] = {r["seed"]: [[round(s[name], 3) for name in STYLES] for s in r["way"]] for r in runs}
    (story.RESULTS / "cyclic.json").write_text(json.dumps(result, indent=1) + "\n")
    (story.RESULTS / "cyclic.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--eta", type=float, default=10.0)
    parser.add_argument("--adam_beta1", type=float, default=0.0)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--dpo_beta", type=float, default=0.1)
    parser.add_argument("--dpo_learning_rate", type=float, default=1e-4)
    parser.add_argument("--dpo_epochs", type=float, default=1.0)
    parser.add_argument("--only", choices=["rebel", "dpo"])
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    story.MAX_NEW_TOKENS = TOKENS
    torch.set_num_threads(1)
    table() if arguments.what == "table" else run(arguments)


if __name__ == "__main__":
    main()
