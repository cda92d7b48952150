"""Drawing by vLLM beside the trainer's own model: tokens a second, and seconds of an iteration ahead or not.

    make test-vllm          makes .venv-vllm, in which this runs
    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/vllm_sampling.py draw
    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python benchmarks/vllm_sampling.py ahead

`draw`: one process in which both draw completions of the same prompts from the same random weights, in turns (one in
8,192 tokens is an end), in seconds of the processor, which others at work do not stretch: set OMP_NUM_THREADS=1. The
ratio of each pair (vLLM over ours, more than 1 is faster), its median with the smallest and largest.
`ahead`: runs with a server that draws in the iteration or during the one before, in turns; seconds of an iteration.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vllm_sampling.jsonl"
VOCABULARY, NAME = 8192, "model"
TRAIN = [sys.executable, "-m", "rebel", "train"]
REWARD = "def remainder(completion_ids, **_):\n    return [sum(ids) % 7 for ids in completion_ids]\n"


@dataclass(frozen=True, slots=True)
class Work:
    """Completions of `length` tokens of prompts, by a Llama of random weights with heads of 64 dimensions."""

    prompts: int
    group: int
    prompt_length: int
    length: int
    hidden: int
    layers: int


WORKS = {
    "8M-short": Work(8, 4, 32, 48, 256, 6),
    "8M-long": Work(4, 8, 512, 64, 256, 6),
    "8M-many": Work(16, 16, 32, 64, 256, 6),
    "60M": Work(8, 8, 64, 64, 640, 10),
}


def model_in(work: Work, folder: Path) -> None:
    """A model and a tokenizer whose words are w0, w1, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=work.hidden,
        intermediate_size=8 * work.hidden // 3 // 32 * 32,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 64,
        num_key_value_heads=work.hidden // 64,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def texts(work: Work) -> list[str]:
    return [" ".join(f"w{3 + (97 * k + i) % 8000}" for i in range(work.prompt_length)) for k in range(work.prompts)]


def draw(name: str, pairs: int) -> dict[str, Any]:
    """Tokens a second of both, in this process."""
    import torch

    from rebel.loading import load_policy
    from rebel.samplers.colocated import colocated
    from rebel.samplers.generate import Generate
    from rebel.samplers.vllm import VLLM, probe_of
    from rebel.types import Prompt

    work = WORKS[name]
    with TemporaryDirectory() as folder:
        model_in(work, Path(folder))
        policy = load_policy(folder, {})
    prompts = [Prompt(text) for text in texts(work)]
    longest = work.prompt_length + work.length
    engine = colocated(policy, longest, torch.float32, 0.3, sleeps=False)
    noted: dict[str, float] = {}
    vllm = VLLM(
        policy, engine, work.length, 1.0, probe_of(policy, prompts[0], longest - 1), 0.01, note=noted.__setitem__
    )
    ours = Generate(policy, work.length, 1.0)
    speeds: dict[str, list[float]] = {"vllm": [], "generate": []}
    vllm.refresh()
    for pair in range(pairs + 1):
        for who, sampler in (("vllm", vllm), ("generate", ours)):
            began = time.process_time()
            found = list(sampler(prompts, work.group, pair))
            took = time.process_time() - began
            tokens = sum(len(c.trace.completion) for rollout in found for c in rollout.completions)
            speeds[who] += [tokens / took] if pair else []  # the first pair is a warm-up
    vllm.refresh()
    ratios = [a / b for a, b in zip(speeds["vllm"], speeds["generate"], strict=True)]
    return {
        "what": "draw",
        "work": name,
        "threads": torch.get_num_threads(),
        "tokens_per_cpu_second": {who: round(statistics.median(found)) for who, found in speeds.items()},
        "ratio": [round(pick(ratios), 2) for pick in (statistics.median, min, max)],
        "seconds_sync": round(noted["sampler/seconds_sync"], 3),
        "mismatch": noted["sampler/mismatch"],
    }


@contextmanager
def serving(folder: Path, longest: int) -> Iterator[str]:
    """The address of a vLLM server of the model in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(longest), "--enforce-eager"]
    more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(command, env=os.environ | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ahead(name: str, pairs: int) -> dict[str, Any]:
    """Seconds of an iteration that draws first, and of one whose completions are drawn during the one before."""
    work = WORKS[name]
    seconds: dict[str, list[float]] = {"now": [], "ahead": []}
    with TemporaryDirectory() as home:
        folder = Path(home)
        model_in(work, folder / "model")
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts(work)))
        (folder / "reward.py").write_text(REWARD)
        with serving(folder / "model", work.prompt_length + work.length) as address:
            for pair in range(pairs):
                for who in seconds:
                    run = folder / f"{who}-{pair}"
                    command = [*TRAIN, "--output_dir", str(run), *flags(work, folder, address)]
                    command += ["--one_step_ahead"] * (who == "ahead")
                    subprocess.run(command, check=True, capture_output=True)
                    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                    seconds[who].append(statistics.median(row["seconds/total"] for row in rows[2:]))
    ratios = [a / b for a, b in zip(seconds["now"], seconds["ahead"], strict=True)]
    return {
        "what": "ahead",
        "work": name,
        "seconds": {who: round(statistics.median(found), 3) for who, found in seconds.items()},
        "ratio": [round(pick(ratios), 2) for pick in (statistics.median, min, max)],
    }


def flags(work: Work, folder: Path, address: str) -> list[str]:
    """The settings of a run, without its folder."""
    given = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "prompts.jsonl",
        "reward_funcs": f"{folder / 'reward.py'}:remainder",
        "prompts_per_iteration": work.prompts,
        "num_generations": work.group,
        "max_prompt_length": work.prompt_length,
        "max_completion_length": work.length,
        "steps_per_iteration": 4,
        "num_iterations": 1,
        "sampling_batch": work.prompts * work.group,
        "iterations": 8,
        "eval_prompts": 0,
        "save_strategy": "no",
        "sampler": "vllm",
        "vllm_mode": "server",
        "vllm_server_base_url": address,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "ahead"])
    parser.add_argument("--work", choices=list(WORKS), action="append")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    for name in given.work or WORKS:
        row = (draw if given.what == "draw" else ahead)(name, given.pairs)
        print(json.dumps(row))
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
