"""`rebel quickstart`."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from rebel.cli.options import command
from rebel.errors import RebelError


def add(commands: Any) -> None:
    about = "see REBEL at work in a few minutes, without a download"
    parser = command(commands, "quickstart", run, about)
    parser.add_argument("task", nargs="?", default="arithmetic", choices=["arithmetic", "images"])
    where = "folder of the run (default: rebel-quickstart, or rebel-quickstart-images)"
    parser.add_argument("--output_dir", help=where)
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random")
    parser.set_defaults(options=("output_dir", "seed"))


def run(arguments: argparse.Namespace) -> int:
    if arguments.task == "images":
        _need("quickstart images", "diffusers", "PIL", "sklearn")
        from rebel.tasks.digits import quickstart
    else:
        from rebel.tasks.arithmetic import quickstart

    named = "rebel-quickstart" + ("-images" if arguments.task == "images" else "")
    quickstart(arguments.output_dir or named, arguments.seed)
    return 0


def _need(command: str, *packages: str) -> None:
    """Raises RebelError where a package is missing that the command needs."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RebelError(f'rebel {command} needs {", ".join(missing)}: pip install "rebel-rl[diffusion]"')
