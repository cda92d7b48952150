"""REBEL beside DPO and IPO on completions that somebody else wrote: the same model, pairs, steps and tuning.

    python benchmarks/offline.py grid      # every run that is not in results/offline.jsonl yet
    python benchmarks/offline.py table     # results/offline.md

The policy is stories260K. Data: GSM8K's model solutions (right against wrong, of the same question) and QA-Feedback
(answers that people compared, ties left out). A pair with a side over the model's 512 tokens is dropped and counted.

What is matched: initial weights, training pairs (in tokens as well: the run stops if TRL's differ), 8 pairs a step,
the number of steps, AdamW without weight decay, constant learning rate, gradients clipped at 1, fp32, no dropout.
Each method has a grid of three learning rates times two betas or etas, and takes the point that orders most pairs of
a validation split. The prompts of tuning are not among those of the reported seeds, of which each has a split
into training and test prompts of its own. IPO is TRL's: its log-ratios are means over tokens, so its beta has
another unit than DPO's.

`rebel` has the pairs as rows, as the others have. `rebel groups` has the completions of a prompt together, the
form it is made for: all comparisons of a prompt in one place, those of equal reward included, one forward pass for each
completion instead of one for each side of each pair. `eta 1e6` is the regression switched off.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import story
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

import rebel
from rebel.policies.causal_lm import CausalLM, causal_lm
from rebel.report import read_rows
from rebel.types import Prompt, TokenTrace

RUNS = story.RESULTS / "offline.jsonl"
TABLE = story.RESULTS / "offline.md"
LONGEST = 512
PAIRS_A_STEP = 8
TRAINING, VALIDATION, TEST = 200, 240, 320
"""Pairs of a training, a validation and a test split."""
SEEDS = (1, 2, 3, 4, 5)
RATES = (3e-5, 1e-4, 3e-4)
SCALES = {"rebel": (10.0, 100.0), "dpo": (0.1, 0.01), "ipo": (1.0, 0.1), "rebel groups": (10.0, 100.0)}
TRL_LOSS = {"dpo": "sigmoid", "ipo": "ipo"}
SETS = ("gsm8k", "qa-feedback")


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its completions, and which of them (first) is better than which (second)."""

    prompt: str
    completions: tuple[str, ...]
    better: tuple[tuple[int, int], ...]
    row: Mapping[str, Any]

    @property
    def pairs(self) -> list[dict[str, str]]:
        return [
            {"prompt": self.prompt, "chosen": self.completions[i], "rejected": self.completions[j]}
            for i, j in self.better
        ]


@dataclass(frozen=True, slots=True)
class Settings:
    """One run apart from its seed; seed 0 is tuning. `scale` is eta, or the peer's beta."""

    data: str
    method: str
    learning_rate: float
    scale: float


@dataclass(frozen=True, slots=True)
class Split:
    """Training groups, and pairs to measure on."""

    training: Sequence[Group]
    held_out: Sequence[dict[str, str]]


def read_lines(*parts: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in story.folder(parts[0]).joinpath(*parts[1:]).read_text().splitlines()]


def gsm8k() -> Iterator[Group]:
    for row in read_lines("gsm8k", "model_solutions_grouped.jsonl"):
        texts = tuple(completion["text"] for completion in row["completions"])
        rewards = [completion["reward"] for completion in row["completions"]]
        better = tuple((i, j) for i in range(len(texts)) for j in range(len(texts)) if rewards[i] > rewards[j])
        yield Group(row["prompt"], texts, better, {"rewards": rewards})


def qa_feedback() -> Iterator[Group]:
    for row in read_lines("qa-feedback", "tournaments.jsonl"):
        count = len(row["completions"])
        better = tuple((i, j) for i in range(count) for j in range(count) if row["pref"][i][j] > 0)
        yield Group(row["prompt"], tuple(row["completions"]), better, {"comparisons": row["pref"]})


@cache
def initial() -> CausalLM:
    return causal_lm(story.load_policy().requires_grad_(False), story.load_tokenizer())


@cache
def trace(prompt: str, completion: str) -> TokenTrace:
    policy, x = initial(), Prompt(prompt)
    ids = policy.encode(x)
    return TokenTrace(tuple(ids), tuple(policy.recorded(x, ids, completion)))


@cache
def groups(data: str) -> tuple[list[Group], Counter]:
    """The groups whose completions fit and are not all equal, in a fixed random order, and what was left out."""
    found, lost = [], Counter()
    for group in {"gsm8k": gsm8k, "qa-feedback": qa_feedback}[data]():
        fits = [len(trace(group.prompt, text)) <= LONGEST for text in group.completions]
        same = [(i, j) for i, j in group.better if group.completions[i] == group.completions[j]]
        kept = tuple(pair for pair in group.better if fits[pair[0]] and fits[pair[1]] and pair not in same)
        lost["pairs"] += len(group.better)
        lost["pairs over 512 tokens"] += sum(not (fits[i] and fits[j]) for i, j in group.better)
        lost["pairs of equal texts"] += len(same)
        if kept:
            found.append(replace(group, better=kept))
    random.Random(0).shuffle(found)
    return found, lost


def split(data: str, seed: int) -> Split:
    """Tuning has the first quarter of the prompts; each seed divides the others anew."""
    everything = groups(data)[0]
    quarter = len(everything) // 4
    pool = everything[:quarter] if seed == 0 else everything[quarter:]
    mixed = random.Random(seed).sample(pool, len(pool))
    training, used = whole_steps(mixed, TRAINING)
    held_out = [pair for group in mixed[used:] for pair in group.pairs]
    return Split(training, held_out[: TEST if seed else VALIDATION])


def whole_steps(mixed: Sequence[Group], count: int) -> tuple[list[Group], int]:
    """Groups with exactly `count` pairs together (the last one cut), and how many groups that took."""
    training: list[Group] = []
    left = count
    for used, group in enumerate(mixed, 1):
        training.append(replace(group, better=group.better[:left]))
        left -= len(training[-1].better)
        if not left:
            return training, used
    raise SystemExit(f"there are no {count} pairs")


@torch.no_grad()
def log_probs(policy: CausalLM, pairs: Sequence[dict[str, str]]) -> Tensor:
    """log pi of chosen and rejected, a row each; pairs of like length together."""
    order = sorted(range(len(pairs)), key=lambda k: len(trace(pairs[k]["prompt"], pairs[k]["chosen"])))
    logp = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for places in [order[k : k + 8] for k in range(0, len(order), 8)]:
        traces = [trace(pairs[k]["prompt"], pairs[k][side]) for k in places for side in ("chosen", "rejected")]
        logp[places] = policy.log_prob(traces).double().reshape(-1, 2)
    return logp


def measured(model: Any, held_out: Sequence[dict[str, str]], reference: Tensor, eta: float | None) -> dict[str, float]:
    """Accuracy of the order of pairs, and R^2 at the best scale there is (and at the method's own, for REBEL)."""
    moved = log_probs(causal_lm(model, story.load_tokenizer()), held_out) - reference
    gap = moved[:, 0] - moved[:, 1]
    right = (gap > 0).double() + 0.5 * (gap == 0).double()
    best = float(gap.mean() ** 2 / gap.square().mean()) if gap.any() else 0.0
    own = {} if eta is None else {"r2_own": 1 - float((gap / eta - 1).square().mean())}
    return {
        "accuracy": float(right.mean()),
        "r2": best if gap.mean() > 0 else 0.0,
        **own,
        "better": float(moved[:, 0].mean()),
        "worse": float(moved[:, 1].mean()),
    }


@cache
def references(data: str, seed: int) -> Tensor:
    return log_probs(initial(), split(data, seed).held_out)


def rebel_run(settings: Settings, seed: int, training: Sequence[Group], folder: Path) -> tuple[Any, list[float]]:
    """The tuned model and the norms of its gradients."""
    grouped = settings.method == "rebel groups"
    rows = [row_of(group) for group in training] if grouped else [pair for group in training for pair in group.pairs]
    steps = TRAINING // PAIRS_A_STEP
    model = story.load_policy()
    norms: list[float] = []
    args = rebel.RebelConfig(
        eta=settings.scale,
        learning_rate=settings.learning_rate,
        max_grad_norm=1.0,
        average=0.0,
        num_train_epochs=1,
        prompts_per_iteration=len(rows),
        steps_per_iteration=steps,
        max_completion_length=LONGEST,
        margin_type="votes" if grouped and settings.data == "qa-feedback" else "margin",
        output_dir=str(folder / "run"),
        save_strategy="no",
        eval_prompts=0,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = rebel.RebelTrainer(model, args=args, train_dataset=rows, processing_class=story.load_tokenizer())
    learner = trainer.job.run.learner
    plain = learner.step

    def step() -> None:
        plain()
        norms.append(learner.grad_norm)

    learner.step = step  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train()
    assert len(norms) == steps
    return trainer.model, norms


def row_of(group: Group) -> dict[str, Any]:
    """A group as REBEL reads it: its completions that fit, with rewards or comparisons of them."""
    places = [k for k, text in enumerate(group.completions) if len(trace(group.prompt, text)) <= LONGEST]
    row: dict[str, Any] = {"prompt": group.prompt, "completions": [group.completions[k] for k in places]}
    if "rewards" in group.row:
        return row | {"rewards": [group.row["rewards"][k] for k in places]}
    return row | {"comparisons": [[group.row["comparisons"][i][j] for j in places] for i in places]}


def trl_run(settings: Settings, seed: int, training: Sequence[Group], folder: Path) -> tuple[Any, list[float]]:
    """The tuned model and the norms of its gradients, by TRL's DPOTrainer."""
    rows = [pair for group in training for pair in group.pairs]
    config = trl.DPOConfig(
        output_dir=str(folder / "run"),
        loss_type=[TRL_LOSS[settings.method]],
        beta=settings.scale,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_steps=len(rows) // PAIRS_A_STEP,
        per_device_train_batch_size=PAIRS_A_STEP,
        precompute_ref_log_probs=True,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    model = story.load_policy()
    trainer = trl.DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=story.load_tokenizer()
    )
    check_tokens(trainer.train_dataset, rows)
    trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == config.max_steps
    return trainer.model, norms


def check_tokens(dataset: Any, rows: Sequence[dict[str, str]]) -> None:
    """Stops unless TRL trains on the tokens that REBEL trains on."""
    for theirs, row in zip(dataset, rows, strict=True):
        for side in ("chosen", "rejected"):
            ours = trace(row["prompt"], row[side])
            assert tuple(theirs["prompt_ids"]) == ours.prompt and tuple(theirs[f"{side}_ids"]) == ours.completion


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Train and measure; the row of results."""
    torch.manual_seed(seed)
    parts, began = split(settings.data, seed), time.process_time()
    train = trl_run if settings.method in TRL_LOSS else rebel_run
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        model, norms = train(settings, seed, parts.training, Path(folder))
    eta = settings.scale if settings.method == "rebel" else None
    return {
        **asdict(settings),
        "seed": seed,
        **measured(model, parts.held_out, references(settings.data, seed), eta),
        "grad_norm_median": median(norms),
        "grad_norm_max": max(norms),
        "grad_norm_final": norms[-1],
        "finite": all(map(torch.isfinite, map(torch.tensor, norms))),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in (*Settings.__slots__, "seed"))


def once(settings: Settings, seed: int) -> dict[str, Any]:
    """The row of a run, made now if it is not there yet."""
    rows = {key(row): row for row in read_rows(RUNS)}
    wanted = key(asdict(settings) | {"seed": seed})
    if wanted not in rows:
        rows[wanted] = run(settings, seed)
        with RUNS.open("a") as file:
            file.write(json.dumps(rows[wanted]) + "\n")
        print(json.dumps(rows[wanted]), flush=True)
    return rows[wanted]


def tuned(data: str, method: str, make: Callable[[Settings, int], dict[str, Any] | None]) -> Settings | None:
    """The point of the method's grid with the highest accuracy on the validation split; ties by R^2."""
    grid = [Settings(data, method, rate, scale) for rate in RATES for scale in SCALES[method]]
    rows = [(row["accuracy"], row["r2"], place) for place, s in enumerate(grid) if (row := make(s, 0))]
    return grid[max(rows)[2]] if len(rows) == len(grid) else None


def grid(sets: Sequence[str]) -> None:
    """Tune every method, then run its best point on every seed."""
    for data in sets:
        for method in SCALES:
            best = tuned(data, method, once)
            assert best is not None
            for seed in SEEDS:
                once(best, seed)
                if method.startswith("rebel"):
                    once(replace(best, scale=1e6), seed)


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["grid", "one", "table"])
    parser.add_argument("--data", choices=SETS, help="grid: one of the sets alone")
    parser.add_argument("--method", default="rebel")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--scale", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    if words.command == "grid":
        grid([words.data] if words.data else SETS)
    elif words.command == "one":
        print(json.dumps(run(Settings(words.data, words.method, words.learning_rate, words.scale), words.seed)))
    else:
        TABLE.write_text(table())
        print(TABLE.read_text())


# -- the table -----------------------------------------------------------------------------------------------------


def table() -> str:
    """Both sets as tables, with what was dropped and how the methods were tuned."""
    return "\n".join(line for data in SETS for line in lines_of(data))


def lines_of(data: str) -> Iterator[str]:
    """The table of one set: means over seeds, and differences from REBEL paired by seed."""
    found, lost = groups(data)
    rows = {key(row): row for row in read_rows(RUNS)}
    yield f"## {data}\n"
    yield (
        f"{len(found)} prompts with {sum(len(g.better) for g in found):,} pairs; of {lost['pairs']:,} there were "
        f"{lost['pairs over 512 tokens']} with a side over 512 tokens. {TRAINING} pairs to train on in "
        f"{TRAINING // PAIRS_A_STEP} steps, {TEST} to measure on; seeds {', '.join(map(str, SEEDS))}.\n"
    )
    yield (
        "| method | learning rate | eta or beta | accuracy | REBEL less this, paired | "
        "R² at its own scale, at the best | log-ratio better, worse | gradient norm: median, max, final |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    runs = dict(runs_of(data, rows))
    ours = runs.get("rebel")
    for name, seeds in runs.items():
        yield line(name, seeds, ours)
    yield line_of_accuracy("length alone, the better way round on the training pairs", length_alone(data), ours)
    yield line_of_accuracy("chance", [0.5] * len(SEEDS), ours)
    yield ""


def runs_of(data: str, rows: Mapping[tuple, dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each method at its tuned point, a row a seed; methods that are not finished are left out."""
    for method in SCALES:
        best = tuned(data, method, lambda s, seed: rows.get(key(asdict(s) | {"seed": seed})))
        if best is None:
            continue
        for name, point in ((method, best), (f"{method}, eta 1e6 (regression off)", replace(best, scale=1e6))):
            seeds = [rows.get(key(asdict(point) | {"seed": seed})) for seed in SEEDS]
            if all(seeds):
                yield name, [row for row in seeds if row]


def line(name: str, seeds: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]] | None) -> str:
    first = seeds[0]
    assert all(row["finite"] for row in seeds), "a gradient that is not finite ends a run"
    mean = {k: fmean(row[k] for row in seeds) for k in ("accuracy", "r2", "better", "worse")}
    own = f"{fmean(row['r2_own'] for row in seeds):.3f}, " if "r2_own" in first else "–, "
    norms = [fmean(row[f"grad_norm_{which}"] for row in seeds) for which in ("median", "max", "final")]
    norms[1] = max(row["grad_norm_max"] for row in seeds)
    return (
        f"| {name} | {first['learning_rate']:g} | {first['scale']:g} | {with_error([r['accuracy'] for r in seeds])} | "
        f"{paired([r['accuracy'] for r in seeds], ours)} | {own}{mean['r2']:.3f} | {mean['better']:.1f}, "
        f"{mean['worse']:.1f} | {', '.join(f'{norm:,.0f}' for norm in norms)} |"
    )


def line_of_accuracy(name: str, values: Sequence[float], ours: Sequence[dict[str, Any]] | None) -> str:
    return f"| {name} | | | {with_error(values)} | {paired(values, ours)} | | | |"


def with_error(values: Sequence[float]) -> str:
    """Mean over seeds with its standard error."""
    return f"{fmean(values):.4f} ± {stdev(values) / len(values) ** 0.5:.4f}"


def paired(theirs: Sequence[float], ours: Sequence[dict[str, Any]] | None) -> str:
    if ours is None:
        return ""
    differences = [row["accuracy"] - other for row, other in zip(ours, theirs, strict=True)]
    return with_error(differences) if any(differences) else ""


def length_alone(data: str) -> list[float]:
    """Accuracy of "the longer is better", or of the opposite where the training pairs say so, on every seed."""

    def longer(pairs: Sequence[dict[str, str]]) -> float:
        gaps = [len(trace(p["prompt"], p["chosen"])) - len(trace(p["prompt"], p["rejected"])) for p in pairs]
        return fmean((gap > 0) + 0.5 * (gap == 0) for gap in gaps)

    found = []
    for seed in SEEDS:
        parts = split(data, seed)
        training = longer([pair for group in parts.training for pair in group.pairs])
        test = longer(parts.held_out)
        found.append(test if training >= 0.5 else 1 - test)
    return found


if __name__ == "__main__":
    main()
