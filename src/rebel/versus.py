"""`rebel evaluate`: completions of the evaluation prompts by two policies, and how often a judge prefers ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rebel.against import Contents, duel, paired, references
from rebel.build.evaluation import tokens_in
from rebel.build.learner import memory_of_average
from rebel.build.model import build_accelerator
from rebel.build.prompts import build_prompts, fitting
from rebel.build.rewards import build_judge, build_reward
from rebel.checkpoint import PREFIX
from rebel.collect import Source, draw
from rebel.config import RebelConfig
from rebel.data import PromptStream, load_prompts, seed_of
from rebel.errors import RebelError
from rebel.evaluate import reward_metrics
from rebel.iterates import Iterates
from rebel.job import quiet, stored_iterates
from rebel.loading import load_policy
from rebel.policies.causal_lm import CausalLM
from rebel.report.rows import plain
from rebel.report.versus import show, write_page
from rebel.rewards.functions import Notes
from rebel.rewards.winrate import check_judge
from rebel.run_folder import BEST, SETTINGS
from rebel.samplers.generate import Generate
from rebel.samplers.mixture import Mixture
from rebel.settings import read_yaml, resolve
from rebel.types import Completion, Prompt, Rollout, Sampler

REFERENCES = "references"
RESULT, PAGE = "evaluation.json", "evaluation.html"
MODEL_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Request:
    """What `rebel evaluate` is asked for, beyond settings of a run."""

    run: str
    judge: str
    against: str | None = None
    mixture: bool = False
    reference_column: str = "reference"
    completions: int = 1
    examples: int = 4
    output_dir: str | None = None


@dataclass(frozen=True)
class Side:
    """Who writes completions: a policy, with which one it is in words."""

    name: str
    which: str
    policy: CausalLM
    iterates: Iterates | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.which})"


def compare(request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate, print and write the result; `given` are settings over those of the run."""
    quiet()
    config = settings_of(request.run, given)
    folder = folder_of(request)
    models = {"trust_remote_code": config.trust_remote_code, **({"device": "cpu"} if config.use_cpu else {})}
    judge = build_judge(request.judge, replace(config, output_dir=str(folder)), Notes(), models)
    prompts = prompts_of_run(request, config, given)
    check_judge(judge, prompts)
    ours = side(request.run, config, request.mixture)
    theirs = opponent(request, config)
    prompts, dropped = that_fit_both(prompts, [ours, *([theirs] if theirs else [])], config)
    rollouts = completions_of(ours, prompts, request.completions, config)
    if theirs is None:
        others = references(prompts, request.reference_column)
    else:
        drawn = completions_of(theirs, prompts, request.completions, config)
        others = [[completion.content for completion in rollout.completions] for rollout in drawn]
    found = duel(judge, paired(rollouts, others), partial(tokens_in, ours.policy), seed_of(config.seed))
    result = {
        "ours": str(ours),
        "theirs": str(theirs) if theirs else f"the column {request.reference_column} of the data",
        "judge": judge.name,
        **found.summary(),
        "rewards": rewards_of(config, given, rollouts, others),
        "left_out": [f"{dropped} prompts that do not fit"] if dropped else [],
        "temperature": temperature(config),
        "max_completion_length": config.max_completion_length,
        "seed": config.seed,
        "rows": found.rows(),
    }
    show(result, request.examples)
    (folder / RESULT).write_text(json.dumps(plain(result), indent=1, allow_nan=False))
    print(f"written  {folder / RESULT}, {write_page(result, folder / PAGE)}")
    return result


# -- what is compared ----------------------------------------------------------------------------------------------


def settings_of(run: str, given: Mapping[str, Any]) -> RebelConfig:
    """The settings of the run (of a checkpoint: of the run it belongs to), with those given over them."""
    file = settings_file(run)
    return resolve(read_yaml(file) if file else {}, given)


def settings_file(run: str) -> Path | None:
    folder = Path(run).expanduser()
    found = [place / SETTINGS for place in (folder, folder.parent) if (place / SETTINGS).exists()]
    return found[0] if found and (found[0].parent == folder or folder.name.startswith(PREFIX)) else None


def folder_of(request: Request) -> Path:
    """Where the result goes: into the run, or where --output_dir says."""
    own = Path(request.run).expanduser()
    folder = Path(request.output_dir) if request.output_dir else own if own.is_dir() else Path("rebel-evaluation")
    if folder.exists() and not folder.is_dir():
        raise RebelError(f"--output_dir {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prompts_of_run(request: Request, config: RebelConfig, given: Mapping[str, Any]) -> list[Prompt]:
    """The prompts that the run kept out of training; the first of another dataset where one is named."""
    if not config.dataset_name:
        raise RebelError(f"{request.run} has no {SETTINGS} that names its prompts: give --dataset_name")
    if config.eval_prompts < 1:
        raise RebelError("--eval_prompts 0 leaves nothing to evaluate on; use 1 or more")
    trained = settings_file(request.run)
    elsewhere = {"dataset_name", "dataset_config", "dataset_test_split"} & given.keys()
    if trained and not elsewhere:
        kept = resolve(read_yaml(trained)).eval_prompts
        if config.eval_prompts > kept and not config.dataset_test_split:
            raise RebelError(
                f"--eval_prompts {config.eval_prompts}: the run kept {kept} prompts out of training; use at most that, "
                "or name other prompts by --dataset_name"
            )
        return build_prompts(replace(config, eval_prompts=kept))[1][: config.eval_prompts]
    split = config.dataset_test_split or config.dataset_train_split
    named = load_prompts(str(config.dataset_name), split, config.prompt_column, config.dataset_config)
    return named[: config.eval_prompts]


def opponent(request: Request, config: RebelConfig) -> Side | None:
    """The other side; None for references. Without --against it is the model that the run began with."""
    name = request.against or config.model_name_or_path
    if name is None:
        raise RebelError(f"{request.run} does not say which model it began with: give --against")
    if name == REFERENCES:
        return None
    file = settings_file(name)
    template = resolve(read_yaml(file)).chat_template_kwargs if file else config.chat_template_kwargs
    return side(name, replace(config, chat_template_kwargs=template))


def side(name: str, config: RebelConfig, mixture: bool = False) -> Side:
    """The policy in that folder or of that name, or the mixture of the iterates that its run kept."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in MODEL_FILES):
        found = sorted(folder.glob(f"{PREFIX}*"), key=lambda path: path.stat().st_mtime)
        hint = f"; give {found[-1]} for its latest checkpoint" if found else ""
        raise RebelError(f"{name} has no model in it{' (yet)' if (folder / SETTINGS).exists() else ''}{hint}")
    accelerator = build_accelerator(config)
    policy = load_policy(name, config.chat_template_kwargs, accelerator.device, config.trust_remote_code)
    if not mixture:
        return Side(name, which_policy(name), policy)
    iterates = stored_iterates(folder, dict(policy.model.named_parameters()))
    return Side(name, f"mixture of {len(iterates.stored())} iterates", policy, iterates)


def which_policy(name: str) -> str:
    """Which policy of a run a folder holds."""
    file, folder = settings_file(name), Path(name).expanduser()
    if file is None:
        return "a model as it is"
    config = resolve(read_yaml(file))
    which = "averaged iterate" if memory_of_average(config) else "last iterate"
    if file.parent != folder:
        return f"{which} at {folder.name.replace('-', ' ')}"
    if config.load_best_model_at_end and (folder / BEST).exists():
        return f"best evaluation's {which}"
    return which


# -- completions ---------------------------------------------------------------------------------------------------


def that_fit_both(prompts: Sequence[Prompt], sides: Sequence[Side], config: RebelConfig) -> tuple[list[Prompt], int]:
    """The prompts that leave room for a completion on every side, and the number of the others."""
    kept = list(prompts)
    for one in sides:
        kept, _ = fitting(kept, one.policy, config)
    return kept, len(prompts) - len(kept)


def temperature(config: RebelConfig) -> float:
    return config.temperature if config.eval_temperature is None else config.eval_temperature


def completions_of(one: Side, prompts: Sequence[Prompt], each: int, config: RebelConfig) -> list[Rollout]:
    """Completions of the prompts. Both sides have the same random numbers, so that equal policies write equal texts."""
    sampler: Sampler = Generate(one.policy, config.max_completion_length, temperature(config))
    chunk = max(1, config.sampling_batch // each)
    if one.iterates:  # which it loads for each chunk
        sampler, chunk = Mixture(sampler, one.iterates, config.sampling_batch), len(prompts)
    source = Source(sampler, unscored, PromptStream(prompts, config.seed), each, chunk)
    return draw(source, prompts, seed_of(config.seed), lambda: False, lambda count: None)


def unscored(rollouts: Sequence[Rollout]) -> list[Any]:
    raise AssertionError("these completions are judged, not scored")


def rewards_of(
    config: RebelConfig, given: Mapping[str, Any], ours: Sequence[Rollout], theirs: Contents
) -> dict[str, tuple[float, float]]:
    """Mean rewards of both sides by the functions of --reward_funcs, where it is given."""
    if "reward_funcs" not in given:
        return {}
    reward = build_reward(replace(config, judge=None, reward_weights=None), Notes())
    others = [
        Rollout(rollout.prompt, tuple(Completion(content, None) for content in contents))
        for rollout, contents in zip(ours, theirs, strict=True)
    ]
    means = [reward_metrics(reward(side)) for side in (ours, others)]
    parts = [name for name in means[0] if name.startswith("eval/rewards/")]
    names = [*parts, "eval/reward"] if len(parts) > 1 else parts
    return {name.removeprefix("eval/").removeprefix("rewards/"): (means[0][name], means[1][name]) for name in names}
