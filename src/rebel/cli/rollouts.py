"""`rebel rollout` and `rebel score`: drawing and scoring in bulk, apart from training."""

from __future__ import annotations

import argparse
from typing import Any

from rebel.cli.options import add_setting, add_settings, command, folder_of, settings_in, wide
from rebel.errors import RebelError
from rebel.settings import known, read_yaml, resolve
from rebel.validate import validate_drawing, validate_scoring

ROLLOUT = (
    "Draw completions of the whole prompt set to disk, for `rebel score` and `rebel train --from_rollouts`. Settings "
    "are those of `rebel train`, from the same file. Interrupted, it goes on when it is given again."
)


def add_rollout(commands: Any) -> None:
    usage = "rebel rollout [config.yaml] --to FOLDER [--from_file FILE] [--SETTING VALUE ...]"
    parser = command(commands, "rollout", rollout, "draw completions of a whole prompt set to disk", usage=usage)
    parser.description, parser.formatter_class = ROLLOUT, wide
    parser.add_argument("config", nargs="?", help="YAML file with settings")
    parser.add_argument("--to", help="folder of the rollouts (unset: that of --from_rollouts)")
    parser.add_argument("--from_file", help="take completions that another program drew: rows of a .jsonl or the like")
    add_settings(parser)
    parser.set_defaults(options=(*known(), "to", "from_file"))


def rollout(arguments: argparse.Namespace) -> int:
    flags = settings_in(arguments)
    if "round_prompts" in flags:
        raise RebelError(
            f"--round_prompts {flags['round_prompts']}: `rebel rollout` draws from all prompts; for fewer of them give "
            "a shorter file, or of a dataset of the hub --dataset_train_split 'train[:100]'"
        )
    if arguments.to:
        flags["from_rollouts"] = arguments.to
    config = validate_drawing(resolve(read_yaml(arguments.config), flags), prompts=not arguments.from_file)
    from rebel.rollout_job import rollout

    rollout(config, arguments.from_file)
    return 0


def add_score(commands: Any) -> None:
    parser = command(commands, "score", score, "score rollouts that `rebel rollout` drew")
    parser.add_argument("rollouts", help="folder of the rollouts")
    names = ("reward_funcs", "reward_weights", "trust_remote_code", "use_cpu", "disable_tqdm")
    for name in names:
        add_setting(parser, known()[name])
    parser.set_defaults(options=names)


def score(arguments: argparse.Namespace) -> int:
    folder = folder_of(arguments.rollouts, "the folder that `rebel rollout` wrote")
    flags = settings_in(arguments)
    config = validate_scoring(resolve(flags))
    from rebel.rollout_job import score_rollouts

    score_rollouts(config, str(folder))
    return 0
