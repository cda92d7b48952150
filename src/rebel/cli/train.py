"""`rebel train`."""

from __future__ import annotations

import argparse
import os
from typing import Any

from rebel.cli.options import add_settings, command, settings_in, wide
from rebel.from_trl import translate_batch
from rebel.settings import known, read_yaml, resolve
from rebel.validate import validate

TRAIN = (
    "Tune a model. Settings come from the YAML file, whose keys are the names below, and from flags, which "
    "win. Flags take hyphens for underscores; those of true or false can stand alone (--use_peft) or be "
    "turned off (--no-use_peft)."
)


def add(commands: Any) -> None:
    usage = "rebel train [config.yaml] [--eta 10] [--resume [CHECKPOINT]] [--dry-run] [--SETTING VALUE ...]"
    parser = command(commands, "train", run, "tune a model, by a YAML file and flags", usage=usage)
    parser.description, parser.formatter_class = TRAIN, wide
    parser.add_argument("config", nargs="?", help="YAML file with settings")
    parser.add_argument("--dry_run", action="store_true", help="print the plan of the run and stop")
    add_settings(parser)
    parser.set_defaults(options=(*known(), "resume", "dry_run"))


def run(arguments: argparse.Namespace) -> int:
    flags = settings_in(arguments)
    config = resolve(read_yaml(arguments.config), flags)
    config, lines = translate_batch(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if lines and os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n")
    config = validate(config)
    from rebel.job import run_training

    run_training(config, dry_run=arguments.dry_run)
    return 0
