"""Tokens per second and peak memory of an 8B language model on one GPU, beside TRL doing the same work.

    python benchmarks/gpu_lm.py                     LoRA and full bf16, each with and without recomputed activations
    python benchmarks/gpu_lm.py --work lora         one of them
    python benchmarks/gpu_lm.py --tiny --cpu        every line of it in under a minute, on a CPU

The model has the shape of Llama-3-8B and random weights, made on the device. Given completions (2 prompts of 1,024
tokens with 8 completions of 512 each) are scored, and one optimiser step is taken on them; then completions are drawn.
TRL's GRPOTrainer gets the same completions through its `rollout_func`, without its reference model. Seconds are medians
after a warm-up. A share is that of the matrix rate measured in the same run (bf16, 8,192 x 8,192 x 8,192), for the
operations that no program can avoid: prompts once, completions once, the output layer where tokens are predicted.

Full training takes Adafactor: weights and gradients in bf16 are 32 GB, Adam's moments would be as much again.
Each work is a process of its own with a limit of seconds; whatever fails is written down as its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_lm.json"
GIB = 2**30
WORKS = ("lora", "full", "lora-recomputed", "full-recomputed")


@dataclass(frozen=True, slots=True)
class Size:
    """The model's shape and the work: `prompts` groups of `group` completions."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256
    prompt: int = 1024
    completion: int = 512
    group: int = 8
    prompts: int = 2
    drawn: int = 64
    matrix: int = 8192
    repeats: int = 3
    budgets: tuple[int, ...] = (8192, 3072, 1536)
    rows: tuple[int, ...] = (4, 2, 1)


TINY = Size(64, 128, 2, 4, 2, 512, 32, 16, 4, 2, 8, 256, 2, (256, 64), (4, 2))


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of one forward pass over all the work, each prompt once."""

    layers: float
    attention: float
    head: float

    @classmethod
    def of(cls, size: Size) -> Operations:
        head_size = size.hidden // size.heads
        projections = size.hidden * head_size * (2 * size.heads + 2 * size.key_heads)
        weights = size.layers * (projections + 3 * size.hidden * size.inner)
        p, c, completions = size.prompt, size.completion, size.prompts * size.group
        tokens = size.prompts * p + completions * c
        seen = size.prompts * p * (p + 1) / 2 + completions * (c * p + c * (c + 1) / 2)
        head = 2 * size.hidden * size.vocabulary * completions * c
        return cls(2 * weights * tokens, 4 * size.layers * size.hidden * seen, head)

    @property
    def forward(self) -> float:
        return self.layers + self.attention + self.head

    def training(self, lora: bool) -> float:
        """Forward, gradients of activations, and gradients of weights where all are trained."""
        return 3 * self.forward - (self.layers + self.head if lora else 0)


class Notebook:
    """What was measured, on disk after every line, so that a process that dies leaves what it had."""

    def __init__(self, path: Path, limit: float) -> None:
        self.path, self.ends = path, time.monotonic() + limit
        self.lines: list[dict[str, Any]] = []

    def write(self, **line: Any) -> None:
        self.lines.append(line)
        self.path.write_text(json.dumps(self.lines))

    @contextmanager
    def section(self, who: str, what: str) -> Iterator[dict[str, Any]]:
        """A measurement, or the error it ended with."""
        found: dict[str, Any] = {}
        began = time.monotonic()
        try:
            if began > self.ends:
                raise TimeoutError("no time was left for it")
            yield found
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:300]
        self.write(who=who, what=what, **found, took=round(time.monotonic() - began, 1))
        clear()


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - began


def measured(action: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median seconds after one warm-up, and the peak of memory."""
    action()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(action) for _ in range(repeats))
    return {"seconds": seconds, **peak()}


def peak() -> dict[str, float]:
    return {"peak_gib": torch.cuda.max_memory_allocated() / GIB} if torch.cuda.is_available() else {}


def largest(choices: Sequence[Any], action: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What the action finds with the first choice for which memory suffices."""
    for choice in choices[:-1]:
        try:
            return action(choice)
        except torch.cuda.OutOfMemoryError:
            pass
        clear()
    return action(choices[-1])


# -- the work ------------------------------------------------------------------------------------------------------


def matrix_rate(size: int, device: str) -> float:
    """Operations per second of a large product of matrices in bf16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b) for _ in range(10))


def a_model(size: Size, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16)
    return model.eval()


def a_tokenizer(size: Size) -> Any:
    """Every id a word of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{k}": k for k in range(size.vocabulary)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w3"
    )


def given(size: Size) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts with their completions, as ids; none holds an end of sequence."""
    source = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(4, size.vocabulary, (count,), generator=source).tolist()

    return [(ids(size.prompt), [ids(size.completion) for _ in range(size.group)]) for _ in range(size.prompts)]


def packed(book: Notebook, size: Size, device: str, lora: bool, recompute: bool, folder: str) -> None:
    """As rebel, with FlexAttention over one row of everything, which takes gradients on a GPU alone."""
    if device == "cuda":
        rebel(book, size, device, lora, recompute, folder, in_one_row=True)


def rebel(
    book: Notebook, size: Size, device: str, lora: bool, recompute: bool, folder: str, in_one_row: bool = False
) -> None:
    """Score, update and draw as a run of rebel does."""
    from rebel import RebelConfig
    from rebel.algorithm import regress
    from rebel.build.learner import build_learner
    from rebel.build.model import build_accelerator, build_policy, with_adapter
    from rebel.pairing import all_pairs
    from rebel.samplers.generate import Generate
    from rebel.trackers import training_arguments
    from rebel.types import Completion, Prompt, Rollout, Scored, TokenTrace

    config = RebelConfig(
        output_dir=folder,
        use_peft=lora,
        dtype="bfloat16",
        bf16=lora,
        optim="adamw_torch" if lora else "adafactor",
        gradient_checkpointing=recompute,
        attn_implementation="flex_attention" if in_one_row else None,
        num_generations=size.group,
        learning_rate=1e-6,
        use_cpu=device == "cpu",
    )
    arguments = training_arguments(config)
    accelerator = build_accelerator(config)
    model = a_model(size, device)
    policy = build_policy(with_adapter(model, config) if lora else model, a_tokenizer(size), config)
    learner = build_learner(accelerator, policy, config, arguments, 100, config.tokens_per_micro_batch)
    groups = [
        Scored(
            Rollout(Prompt("x"), tuple(Completion("y", TokenTrace(tuple(prompt), tuple(c))) for c in completions)),
            rewards=torch.arange(size.group, dtype=torch.float64),
        )
        for prompt, completions in given(size)
    ]
    traces = [trace for group in groups for trace in group.rollout.traces]

    def update() -> None:
        everyone = [list(range(size.prompts))]
        list(regress(groups, everyone, learner.update, pairing=all_pairs, step=1.0, anchor={}, reference={}))

    def within(budget: int, action: Callable[[], Any]) -> dict[str, Any]:
        learner.budget = budget
        return measured(action, size.repeats) | {"micro_batch": f"{budget} tokens"}

    def score() -> None:
        learner.score(learner.policy.log_prob, traces)

    who = "rebel, packed" if in_one_row else "rebel"
    layout = "a prompt once" if policy.layout.shares else "a prompt for each completion"
    for what, action in (("scoring", score), ("training", update)):
        with book.section(who, what) as found:
            found["layout"] = layout
            found |= largest(size.budgets, lambda budget, action=action: within(budget, action))
    if in_one_row:
        return
    sampler = Generate(learner.policy, size.drawn, 1.0, accelerator.autocast)
    prompts = [prompt for prompt, _ in given(size)]
    with book.section("rebel", "sampling") as found, torch.inference_mode(), accelerator.autocast():
        found |= measured(lambda: sampler.draw(prompts, size.group, 0), 1)


def trl(book: Notebook, size: Size, device: str, lora: bool, recompute: bool, folder: str) -> None:
    """The same through TRL's GRPOTrainer."""
    from peft import LoraConfig

    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = None
    clock: list[float] = []

    def steps(rows: int) -> dict[str, Any]:
        nonlocal trainer
        trainer = None
        clock.clear()
        clear()
        model = a_model(size, device)
        trainer = grpo(model, adapter if lora else None, size, rows, recompute, clock, folder, device)
        trainer.train()
        seconds = [after - before for before, after in zip(clock[::2], clock[1::2], strict=True)]
        return {"seconds": statistics.median(seconds[1:]), **peak(), "micro_batch": f"{rows} rows"}

    with book.section("trl", "training") as found:
        found |= largest(size.rows, steps)
    with book.section("trl", "scoring") as found:
        found |= largest(size.rows, lambda rows: trl_scores(trainer, size, rows))
    with book.section("trl", "sampling") as found:
        found |= trl_draws(trainer, size)


def grpo(
    model: Any, adapter: Any, size: Size, rows: int, recompute: bool, clock: list[float], folder: str, device: str
) -> Any:
    """A GRPOTrainer whose clock starts where its completions are scored and stops at the end of its step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    total, work = size.prompts * size.group, given(size)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait()
            clock.append(time.perf_counter())

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        turn: dict[str, int] = {}
        completions = []
        for prompt in prompts:
            completions.append(work[int(prompt)][1][turn.get(prompt, 0) % size.group])
            turn[prompt] = turn.get(prompt, 0) + 1
        return {"prompt_ids": [work[int(p)][0] for p in prompts], "completion_ids": completions, "logprobs": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        wait()
        if torch.cuda.is_available() and len(clock) == 2:  # after the warm-up
            torch.cuda.reset_peak_memory_stats()
        clock.append(time.perf_counter())
        return [float(k % size.group) for k in range(len(completions))]

    arguments = GRPOConfig(
        output_dir=folder,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        optim="adamw_torch" if adapter else "adafactor",
        max_steps=size.repeats + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=total // rows,
        num_generations=size.group,
        max_completion_length=size.completion,
        beta=0.0,
        max_grad_norm=0.0,
        bf16=True,
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(k) for k in range(size.prompts)] * 8}),
        processing_class=a_tokenizer(size),
        peft_config=adapter,
        rollout_func=rollout,
        callbacks=[Clock()],
    )


def trl_scores(trainer: Any, size: Size, rows: int) -> dict[str, Any]:
    whole = [prompt + completion for prompt, completions in given(size) for completion in completions]
    ids = torch.tensor(whole, device=trainer.accelerator.device)

    @torch.no_grad()
    def score() -> None:
        trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), size.completion, batch_size=rows
        )

    trainer.model.eval()
    return measured(score, size.repeats) | {"micro_batch": f"{rows} rows"}


def trl_draws(trainer: Any, size: Size) -> dict[str, Any]:
    """What TRL calls without vLLM: transformers' generate, on a row for each completion."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    if hasattr(model, "gradient_checkpointing_disable"):
        model.gradient_checkpointing_disable()
    rows = [prompt for prompt, _ in given(size) for _ in range(size.group)]
    ids = torch.tensor(rows, device=trainer.accelerator.device)

    @torch.no_grad()
    def draw() -> None:
        with trainer.accelerator.autocast():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=size.drawn,
                max_new_tokens=size.drawn,
                do_sample=True,
                top_k=0,
            )

    return measured(draw, 1)


# -- processes and their report --------------------------------------------------------------------------------------


def worker(work: str, size: Size, device: str, path: Path, limit: float) -> None:
    """Everything of one work, ours first."""
    book = Notebook(path, limit)
    lora, recompute = work.startswith("lora"), work.endswith("recomputed")
    with TemporaryDirectory() as folder:
        for who in (rebel, trl, packed):
            try:
                who(book, size, device, lora, recompute, folder)
            except Exception as error:
                book.write(who=who.__name__, what="setting up", error=f"{type(error).__name__}: {error}"[:300])
            clear()


def run(work: str, given: argparse.Namespace, limit: float) -> list[dict[str, Any]]:
    """The lines of one work, from a process that is ended at its limit."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lines.json"
        command = [sys.executable, __file__, "--worker", work, "--lines", str(path), "--limit", str(0.9 * limit)]
        command += ["--tiny"] * given.tiny + ["--cpu"] * given.cpu
        ending = ""
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True)
            ending = done.stderr[-300:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            ending = f"stopped after {limit:.0f} seconds"
        lines = json.loads(path.read_text()) if path.exists() else []
    return [*lines, *([{"who": "both", "what": "process", "error": ending}] if ending else [])]


def with_rates(line: dict[str, Any], work: str, size: Size, rate: float) -> dict[str, Any]:
    """Completion tokens per second, and the share of the matrix rate."""
    if "seconds" not in line:
        return {"work": work, **line}
    completions = size.prompts * size.group
    operations = Operations.of(size)
    count = {"scoring": operations.forward, "training": operations.training(work.startswith("lora"))}
    tokens = completions * (size.drawn if line["what"] == "sampling" else size.completion)
    share = {"share": count[line["what"]] / line["seconds"] / rate} if line["what"] in count else {}
    return {"work": work, **line, "tokens_per_second": tokens / line["seconds"], **share}


def machine(device: str) -> dict[str, Any]:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "versions": {name: of(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
        "commit": commit,
    }


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| work | of | what | completion tokens/s | share of matrix rate | peak GiB | micro-batch |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for line in lines:
        speed = f"{line['tokens_per_second']:,.0f}" if "tokens_per_second" in line else line.get("error", "")[:90]
        share = f"{line['share']:.0%}" if "share" in line else ""
        memory = f"{line['peak_gib']:.1f}" if "peak_gib" in line else ""
        cells = (line["work"], line["who"], line["what"], speed, share, memory, line.get("micro_batch", ""))
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=WORKS, action="append")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--limit", type=float, default=220.0, help="seconds for all works together")
    parser.add_argument("--to", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    device, size = "cpu" if given.cpu else "cuda", TINY if given.tiny else Size()
    if given.worker:
        return worker(given.worker, size, device, given.lines, given.limit)
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny --cpu tries the script on a CPU")
    ends = time.monotonic() + given.limit
    rate = matrix_rate(size.matrix, device)
    clear()
    report = machine(device) | {"matrix_tflops": rate / 1e12, "size": asdict(size), "lines": []}
    print(f"{report['machine']}: {rate / 1e12:.1f} TFLOP/s in bf16", flush=True)
    works = given.work or WORKS
    for number, work in enumerate(works):
        limit = max(10.0, (ends - time.monotonic()) / (len(works) - number) * (1.4 if number + 1 < len(works) else 1))
        report["lines"] += [with_rates(line, work, size, rate) for line in run(work, given, limit)]
        given.to.parent.mkdir(parents=True, exist_ok=True)
        given.to.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report["lines"])))


if __name__ == "__main__":
    main()
