"""`rebel sft` and `rebel reward-model`, whose settings are TRL's."""

from __future__ import annotations

import argparse
import textwrap
from functools import partial
from typing import Any

from rebel.cli.options import command
from rebel.stages.settings import REWARD_MODEL, SFT, Stage, help_of, named, read_words

NAMES = (SFT.name, REWARD_MODEL.name)


def add(commands: Any) -> None:
    briefs = ((SFT, "train a model on written completions"), (REWARD_MODEL, "train a reward model on pairs"))
    for stage, brief in briefs:
        usage = f"rebel {stage.name} [config.yaml] [--SETTING VALUE ...]"
        parser = command(commands, stage.name, partial(run, stage), brief, usage=usage)
        parser.description, parser.epilog = textwrap.fill(stage.about, 110), help_of(stage)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.set_defaults(options=named(stage))


def run(stage: Stage, arguments: argparse.Namespace) -> int:
    given = read_words(arguments.words)
    from rebel.stages.trainers import run_stage

    run_stage(stage, given)
    return 0
