"""`rebel evaluate`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from rebel.cli.options import add_setting, command, wide
from rebel.errors import RebelError
from rebel.settings import known, resolve
from rebel.validate import validate

EVALUATE = {
    "against": "a run, a model, or `references`: written completions in the data (default: the run's model)",
    "judge": "file.py:function of (prompts, first, second, **columns) -> P(first is better), openai:MODEL, a table "
    "(.json), a model's folder or name, or reward:REWARD, of which the higher wins",
    "reference_column": "column of `references` (default: reference)",
    "completions": "completions of each prompt (default: 1)",
    "examples": "pairs to show (default: 4)",
    "output_dir": "folder of the result (default: the run's)",
}
LEAST = {"completions": 1, "examples": 0}
EVALUATION = (
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "prompt_column",
    "eval_prompts",
    "max_prompt_length",
    "max_completion_length",
    "eval_temperature",
    "reward_funcs",
    "chat_template_kwargs",
    "trust_remote_code",
    "sampling_batch",
    "use_cpu",
    "seed",
    "judge_template",
    "judge_base_url",
    "judge_api_key_env",
    "judge_args",
    "judge_concurrency",
    "judge_deadline",
)
"""Settings of a run that `rebel evaluate` may change."""


def add(commands: Any) -> None:
    about = "how often a judge prefers a policy's completions to another's"
    usage = "rebel evaluate RUN [--against BASE] --judge JUDGE [--SETTING VALUE ...]"
    parser = command(commands, "evaluate", run, about, usage=usage)
    parser.formatter_class = wide
    parser.add_argument("run", help="folder of a run or of a checkpoint, or a model")
    for name, text in EVALUATE.items():
        more: Any = {"type": int, "metavar": "INT"} if name in LEAST else {"metavar": "TEXT"}
        parser.add_argument(f"--{name}", help=text, required=name == "judge", default=argparse.SUPPRESS, **more)
    about = "evaluate the mixture of the iterates that the run kept by --mixture K, and not the saved model"
    parser.add_argument("--mixture", action="store_true", help=about)
    group = parser.add_argument_group("settings of the run, over those it was trained with")
    for name in EVALUATION:
        add_setting(group, known()[name])
    parser.set_defaults(options=(*EVALUATE, "mixture", *EVALUATION))


def run(arguments: argparse.Namespace) -> int:
    """Settings of the run are checked here as far as they were given; the rest were when it was trained."""
    asked = {name: value for name, value in vars(arguments).items() if name in EVALUATE}
    given = {name: value for name, value in vars(arguments).items() if name in EVALUATION}
    for name, least in LEAST.items():
        if asked.get(name, least) < least:
            raise RebelError(f"--{name} {asked[name]}: use {least} or more")
    validate(replace(resolve(given), iterations=1, judge=asked["judge"]), inputs=False)
    from rebel.versus import Request, compare

    compare(Request(run=arguments.run, mixture=arguments.mixture, **asked), given)
    return 0
