"""Which checks each command makes: the one file here that knows all of them."""

from __future__ import annotations

from collections.abc import Sequence

from rebel.config import RebelConfig
from rebel.errors import RebelError
from rebel.settings import resolve
from rebel.validate.evaluation import evaluation
from rebel.validate.folders import folder_of_rollouts, folders
from rebel.validate.images import one_kind
from rebel.validate.inputs import has_inputs, has_model, has_prompts, has_reward, reward_weights
from rebel.validate.judges import judge
from rebel.validate.length import length, no_large_batch
from rebel.validate.method import credit, minibatches, mixture, sampling, step
from rebel.validate.numbers import counts, ranges
from rebel.validate.offline import offline
from rebel.validate.paths import functions, paths
from rebel.validate.said import Check
from rebel.validate.schedule import schedule
from rebel.validate.tracking import tracking
from rebel.validate.vllm import meanwhile, vllm
from rebel.validate.weights import adapter, precision

INPUTS = (has_inputs, paths, functions)
CHECKS = (
    *(counts, ranges, step, credit, sampling, minibatches, schedule, precision, length, no_large_batch, evaluation),
    *(folders, reward_weights, judge, mixture, adapter, offline, one_kind, vllm, meanwhile, tracking),
)
DRAWING = (folder_of_rollouts, counts, ranges, sampling, precision, adapter, vllm)
SCORING = (has_reward, reward_weights, functions)


def validate(config: RebelConfig, *, inputs: bool = True) -> RebelConfig:
    """The settings with every value in its type, or one error with all that is wrong.

    TRL's batch arguments are translated before. `inputs=False` where the model, the prompts and the rewards
    are given as objects, as in RebelTrainer.
    """
    return checked(config, INPUTS + CHECKS if inputs else CHECKS)


def validate_drawing(config: RebelConfig, *, prompts: bool = True) -> RebelConfig:
    """The settings of `rebel rollout`, checked: those of a run, of which it needs no reward and no length."""
    return checked(config, ((has_model, has_prompts, paths) if prompts else (has_model, paths)) + DRAWING)


def validate_scoring(config: RebelConfig) -> RebelConfig:
    """The settings of `rebel score`, checked."""
    return checked(config, SCORING)


def checked(config: RebelConfig, checks: Sequence[Check]) -> RebelConfig:
    """The settings, if none of the checks has a complaint."""
    config = resolve(vars(config))
    complaints = [complaint for check in checks for complaint in check(config)]
    if complaints:
        raise RebelError("\n".join(complaints))
    return config
