"""`rebel sample`."""

from __future__ import annotations

import argparse
from typing import Any

from rebel.cli.options import command, folder_of, holding
from rebel.errors import RebelError

MODEL = ("config.json", "adapter_config.json", "model_index.json", "pytorch_lora_weights.safetensors")
"""By which a saved model is known."""


def add(commands: Any) -> None:
    parser = command(commands, "sample", run, "draw completions from a tuned model")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--prompt", action="append", required=True, help="a prompt; may be given again")
    parser.add_argument("--n", type=int, default=4, help="completions per prompt")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: that of training)")
    parser.add_argument("--max_new_tokens", type=int, help="longest completion (default: that of training)")
    parser.add_argument("--mixture", action="store_true", help="draw each from one of the iterates kept by --mixture K")
    parser.set_defaults(options=("prompt", "n", "temperature", "max_new_tokens", "mixture"))


def run(arguments: argparse.Namespace) -> int:
    run, prompts = folder_of(arguments.run), arguments.prompt
    if arguments.n < 1:
        raise RebelError(f"--n {arguments.n}: use 1 or more completions")
    if arguments.temperature is not None and not arguments.temperature >= 0:
        raise RebelError(f"--temperature {arguments.temperature:g}: use 0 (greedy) or a positive number")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise RebelError(f"--max_new_tokens {arguments.max_new_tokens}: use 1 or more")
    holding(run, MODEL, "tuned model, which is written when a run ends")
    from rebel.job import sample

    drawn = sample(run, prompts, arguments.n, arguments.temperature, arguments.max_new_tokens, arguments.mixture)
    for prompt, completions in zip(prompts, drawn, strict=True):
        print(f"\n{prompt}", *(f"\n[{k}] {text}" for k, text in enumerate(completions, 1)), sep="\n")
    return 0
