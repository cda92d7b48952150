"""`rebel`: which command is asked for, and what a mistake looks like."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial

from rebel.cli import evaluate, looking, quickstart, rollouts, sample, stages, train
from rebel.cli.options import Parser, spelled
from rebel.elsewhere import unknown
from rebel.errors import RebelError, RunStopped

EXAMPLES = """\
examples:
  rebel quickstart
  rebel quickstart images
  rebel train config.yaml --eta 10
  rebel train --model_name_or_path MODEL --dataset_name data.jsonl --reward_funcs my.py:score --iterations 9
  rebel train rebel-run/config.yaml --resume
  rebel sample rebel-run --prompt "Once upon a time"
  rebel evaluate rebel-run --judge my.py:better
"""


COMMANDS = (
    *(train.add, stages.add, rollouts.add_rollout, rollouts.add_score, quickstart.add, sample.add, evaluate.add),
    *(looking.add_report, looking.add_doctor),
)
"""What adds each command to the parser, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for a run that stopped, 2 for wrong input, 130 for Ctrl-C."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return arguments.command(arguments)
    except RebelError as error:
        return _complain(f"error: {error}", 2)
    except RunStopped as error:
        return _complain(f"stopped: {error}", 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _complain(message: str, code: int) -> int:
    print("rebel: " + message.replace("\n", "\n  "), file=sys.stderr)
    return code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command and what was given to it; `command` is the function to call."""
    parser = Parser("rebel", description="REBEL: reinforcement learning as least squares.", epilog=EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-V", "--version", action="store_true", help="show the version and exit")
    parser.set_defaults(command=partial(_alone, parser), options=("help", "version"))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    if argv and argv[0] in stages.NAMES:  # whose flags are TRL's, and known once TRL is loaded
        arguments, arguments.words = parser.parse_known_args(argv)
        return arguments
    arguments, rest = parser.parse_known_args(list(spelled(argv)))
    if rest:
        raise RebelError(_unexpected(rest, arguments.options))
    return arguments


def _alone(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.version:
        from importlib.metadata import version

        print(f"rebel {version('rebel-rl')}")
    else:
        parser.print_help()
    return 0


def _unexpected(rest: Sequence[str], options: Iterable[str]) -> str:
    flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
    lines = [flag + unknown(flag.lstrip("-"), options).removeprefix(f"--{flag.lstrip('-')}") for flag in flags]
    return "\n".join(lines) or f"unexpected: {' '.join(rest)}; flags of true or false take true, false, or nothing"
