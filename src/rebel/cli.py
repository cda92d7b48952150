"""The command line. Nothing imports torch before the command and its settings are known to be right."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from rebel.convert import NO, NOTHING, YES, shown
from rebel.errors import RebelError, RunStopped
from rebel.from_trl import translate_batch
from rebel.settings import Setting, known, read_yaml, resolve, unknown
from rebel.stages.settings import REWARD_MODEL, SFT, Stage, help_of, named, read_words
from rebel.validate import validate, validate_drawing, validate_scoring

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

TRAIN = (
    "Tune a model. Settings come from the YAML file, whose keys are the names below, and from flags, which "
    "win. Flags take hyphens for underscores; those of true or false can stand alone (--use_peft) or be "
    "turned off (--no-use_peft)."
)


ROLLOUT = (
    "Draw completions of the whole prompt set to disk, for `rebel score` and `rebel train --from_rollouts`. Settings "
    "are those of `rebel train`, from the same file. Interrupted, it goes on when it is given again."
)


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as errors of ours."""

    def error(self, message: str) -> NoReturn:
        raise RebelError(message)


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
    adders = (_add_train, _add_stages, _add_rollout, _add_score, _add_quickstart, _add_sample, _add_evaluate)
    for add in (*adders, _add_report, _add_doctor):
        add(commands)
    if argv and argv[0] in (SFT.name, REWARD_MODEL.name):  # whose flags are TRL's, and known once TRL is loaded
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
    return "\n".join(lines) or f"unexpected: {' '.join(rest)}"


def spelled(argv: Sequence[str]) -> Iterator[str]:
    """Flags with underscores, and a value for each switch: `--no-use-peft` becomes `--use_peft=false`."""
    switches = {f"--{setting.name}" for setting in known().values() if _is_switch(setting)}
    for word, after in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if not re.fullmatch(r"--\w[\w-]*", name):
            yield word
            continue
        name = "--" + name[2:].replace("-", "_")
        if name in switches and not equals and after.lower() not in YES + NO + NOTHING:
            yield f"{name}=true"
        elif (on := "--" + name.removeprefix("--no_")) in switches and on != name:
            yield f"{on}=false"
        else:
            yield name + equals + value


def _add_train(commands: Any) -> None:
    usage = "rebel train [config.yaml] [--eta 10] [--resume [CHECKPOINT]] [--dry-run] [--SETTING VALUE ...]"
    train = _command(commands, "train", _train, "tune a model, by a YAML file and flags", usage=usage)
    train.description, train.formatter_class = TRAIN, _wide
    train.add_argument("config", nargs="?", help="YAML file with settings")
    train.add_argument("--dry_run", action="store_true", help="print the plan of the run and stop")
    _add_settings(train)
    train.set_defaults(options=(*known(), "resume", "dry_run"))


def _add_settings(parser: Parser) -> None:
    for section, settings in groupby(known().values(), key=lambda setting: setting.section):
        group = parser.add_argument_group(section)
        for setting in settings:
            _add_setting(group, setting)


def _add_rollout(commands: Any) -> None:
    usage = "rebel rollout [config.yaml] --to FOLDER [--from_file FILE] [--SETTING VALUE ...]"
    rollout = _command(commands, "rollout", _rollout, "draw completions of a whole prompt set to disk", usage=usage)
    rollout.description, rollout.formatter_class = ROLLOUT, _wide
    rollout.add_argument("config", nargs="?", help="YAML file with settings")
    rollout.add_argument("--to", help="folder of the rollouts (unset: that of --from_rollouts)")
    rollout.add_argument("--from_file", help="take completions that another program drew: rows of a .jsonl or the like")
    _add_settings(rollout)
    rollout.set_defaults(options=(*known(), "to", "from_file"))


def _add_score(commands: Any) -> None:
    score = _command(commands, "score", _score, "score rollouts that `rebel rollout` drew")
    score.add_argument("rollouts", help="folder of the rollouts")
    names = ("reward_funcs", "reward_weights", "trust_remote_code", "use_cpu", "disable_tqdm")
    for name in names:
        _add_setting(score, known()[name])
    score.set_defaults(options=names)


def _add_setting(group: Any, setting: Setting) -> None:
    flags, more = [f"--{setting.name}"], {"metavar": _metavar(setting.hint)}
    if setting.name == "resume_from_checkpoint":
        flags, more = ["--resume", *flags], {"metavar": "CHECKPOINT", "nargs": "?", "const": "true"}
    elif any(get_origin(hint) is list for hint in (setting.hint, *get_args(setting.hint))):
        more |= {"nargs": "+", "action": "extend"}
    default = "" if setting.default in (None, [], {}) else f" (default: {shown(setting.default)})"
    text = setting.help.replace("%", "%%") + default
    group.add_argument(*flags, dest=setting.name, default=argparse.SUPPRESS, help=text, **more)


def _is_switch(setting: Setting) -> bool:
    return setting.hint is bool or get_args(setting.hint) == (bool, type(None))


def _metavar(hint: Any) -> str:
    """`INT`, `FLOAT|auto`, `no|steps`: what may stand behind a flag."""
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    if get_origin(hint) is list:
        return _metavar(get_args(hint)[0])
    inner = [_metavar(kind) for kind in get_args(hint) if kind is not type(None)]
    words = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
    return words.get(hint, "YAML" if get_origin(hint) is dict else "|".join(inner))


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=32)


def _command(commands: Any, name: str, command: Any, about: str, usage: str | None = None) -> Parser:
    parser = commands.add_parser(name, help=about, description=about, usage=usage, allow_abbrev=False)
    parser.set_defaults(command=command, options=("help",))
    return parser


def _add_stages(commands: Any) -> None:
    for stage, brief in (
        (SFT, "train a model on written completions"),
        (REWARD_MODEL, "train a reward model on pairs"),
    ):
        usage = f"rebel {stage.name} [config.yaml] [--SETTING VALUE ...]"
        command = _command(commands, stage.name, partial(_stage, stage), brief, usage=usage)
        command.description, command.epilog = textwrap.fill(stage.about, 110), help_of(stage)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.set_defaults(options=named(stage))


def _add_quickstart(commands: Any) -> None:
    about = "see REBEL at work in a few minutes, without a download"
    quickstart = _command(commands, "quickstart", _quickstart, about)
    quickstart.add_argument("task", nargs="?", default="arithmetic", choices=["arithmetic", "images"])
    where = "folder of the run (default: rebel-quickstart, or rebel-quickstart-images)"
    quickstart.add_argument("--output_dir", help=where)
    quickstart.add_argument("--seed", type=int, default=42, help="seed of everything random")
    quickstart.set_defaults(options=("output_dir", "seed"))


def _add_sample(commands: Any) -> None:
    sample = _command(commands, "sample", _sample, "draw completions from a tuned model")
    sample.add_argument("run", help="folder of the run")
    sample.add_argument("--prompt", action="append", required=True, help="a prompt; may be given again")
    sample.add_argument("--n", type=int, default=4, help="completions per prompt")
    sample.add_argument("--temperature", type=float, help="0 is greedy (default: that of training)")
    sample.add_argument("--max_new_tokens", type=int, help="longest completion (default: that of training)")
    sample.add_argument("--mixture", action="store_true", help="draw each from one of the iterates kept by --mixture K")
    sample.set_defaults(options=("prompt", "n", "temperature", "max_new_tokens", "mixture"))


EVALUATE = {
    "against": "a run, a model, or `references`: written completions in the data (default: what the run began with)",
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


def _add_evaluate(commands: Any) -> None:
    about = "how often a judge prefers a policy's completions to another's"
    usage = "rebel evaluate RUN [--against BASE] --judge JUDGE [--SETTING VALUE ...]"
    evaluate = _command(commands, "evaluate", _evaluate, about, usage=usage)
    evaluate.formatter_class = _wide
    evaluate.add_argument("run", help="folder of a run or of a checkpoint, or a model")
    for name, text in EVALUATE.items():
        more: Any = {"type": int, "metavar": "INT"} if name in LEAST else {"metavar": "TEXT"}
        evaluate.add_argument(f"--{name}", help=text, required=name == "judge", default=argparse.SUPPRESS, **more)
    about = "evaluate the mixture of the iterates that the run kept by --mixture K, and not the saved model"
    evaluate.add_argument("--mixture", action="store_true", help=about)
    group = evaluate.add_argument_group("settings of the run, over those it was trained with")
    for name in EVALUATION:
        _add_setting(group, known()[name])
    evaluate.set_defaults(options=(*EVALUATE, "mixture", *EVALUATION))


def _add_report(commands: Any) -> None:
    report = _command(commands, "report", _report, "write report.html of a run, also of one that still runs")
    report.add_argument("run", help="folder of the run")


def _add_doctor(commands: Any) -> None:
    _command(commands, "doctor", _doctor, "versions, devices, what will not work and why")


def _train(arguments: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(arguments).items() if name in known()}
    config = resolve(read_yaml(arguments.config), flags)
    config, lines = translate_batch(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if lines and os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n")
    config = validate(config)
    from rebel.job import run_training

    run_training(config, dry_run=arguments.dry_run)
    return 0


def _stage(stage: Stage, arguments: argparse.Namespace) -> int:
    given = read_words(arguments.words)
    from rebel.stages.trainers import run_stage

    run_stage(stage, given)
    return 0


def _rollout(arguments: argparse.Namespace) -> int:
    flags = {name: value for name, value in vars(arguments).items() if name in known()}
    if arguments.to:
        flags["from_rollouts"] = arguments.to
    config = validate_drawing(resolve(read_yaml(arguments.config), flags), prompts=not arguments.from_file)
    from rebel.rollout_job import rollout

    rollout(config, arguments.from_file)
    return 0


def _score(arguments: argparse.Namespace) -> int:
    folder = _folder(arguments.rollouts)
    flags = {name: value for name, value in vars(arguments).items() if name in known()}
    config = validate_scoring(resolve(flags))
    from rebel.rollout_job import score_rollouts

    score_rollouts(config, str(folder))
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
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


def _sample(arguments: argparse.Namespace) -> int:
    run, prompts = _folder(arguments.run), arguments.prompt
    if arguments.n < 1:
        raise RebelError(f"--n {arguments.n}: use 1 or more completions")
    if arguments.temperature is not None and not arguments.temperature >= 0:
        raise RebelError(f"--temperature {arguments.temperature:g}: use 0 (greedy) or a positive number")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise RebelError(f"--max_new_tokens {arguments.max_new_tokens}: use 1 or more")
    from rebel.job import sample

    drawn = sample(run, prompts, arguments.n, arguments.temperature, arguments.max_new_tokens, arguments.mixture)
    for prompt, completions in zip(prompts, drawn, strict=True):
        print(f"\n{prompt}", *(f"\n[{k}] {text}" for k, text in enumerate(completions, 1)), sep="\n")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    asked = {name: value for name, value in vars(arguments).items() if name in EVALUATE}
    given = {name: value for name, value in vars(arguments).items() if name in EVALUATION}
    for name, least in LEAST.items():
        if asked.get(name, least) < least:
            raise RebelError(f"--{name} {asked[name]}: use {least} or more")
    validate(replace(resolve(given), iterations=1, judge=asked["judge"]), inputs=False)
    from rebel.versus import Request, compare

    compare(Request(run=arguments.run, mixture=arguments.mixture, **asked), given)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    run = _folder(arguments.run)
    from rebel.report import write_report

    print(write_report(run))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from rebel.doctor import doctor

    return doctor()


def _folder(run: str) -> Path:
    if not Path(run).is_dir():
        raise RebelError(f"{run} is no folder; give the --output_dir of a run")
    return Path(run)
