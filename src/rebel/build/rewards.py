"""The reward as the settings ask for it: functions, models, and win rates with their judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rebel.config import RebelConfig
from rebel.rewards.combine import Weighted
from rebel.rewards.contest import REWARD, HigherReward
from rebel.rewards.functions import Notes
from rebel.rewards.judge_load import Service, load_judge
from rebel.rewards.load import as_reward, load_reward
from rebel.rewards.winrate import AgainstFirst, WinRate
from rebel.run_folder import JUDGED
from rebel.types import Judge, Reward

ANSWERS = "judge_answers.sqlite"
"""In the run's folder: what a judge behind an endpoint has answered, and whom evaluations compare with."""


def build_judge(spec: str, config: RebelConfig, notes: Notes, models: Mapping[str, Any]) -> Judge:
    """The judge of that name, or the reward of reward:NAME; `models` are the settings of models in this process."""
    if spec.startswith(REWARD):
        return HigherReward(load_reward(spec.removeprefix(REWARD), notes, **models), spec)
    service = Service(
        config.judge_base_url,
        config.judge_api_key_env,
        config.judge_args,
        config.judge_concurrency,
        config.judge_deadline,
        Path(config.output_dir) / ANSWERS,
    )
    return load_judge(spec, notes, config.judge_template, service, **models)


def win_rates(config: RebelConfig, notes: Notes, models: Mapping[str, Any]) -> list[WinRate]:
    """The win rate by the judge of the settings, if they name one."""
    if not config.judge:
        return []
    judge = build_judge(str(config.judge), config, notes, models)
    return [WinRate(judge, config.judge_unit, config.judge_opponents, config.judge_swap, notes)]


def for_evaluation(reward: Reward, folder: Path) -> Reward:
    """The reward with win rates against the initial policy: against one's own group they are 1/2 by symmetry."""
    if not isinstance(reward, Weighted):
        return reward
    parts = [AgainstFirst(r, folder / JUDGED) if isinstance(r, WinRate) else r for r in reward.rewards]
    return Weighted(parts, reward.weights, reward.scale)


def build_reward(config: RebelConfig, notes: Notes, rewards: Sequence[Any] | None = None) -> Weighted:
    """The weighted sum of the rewards of the settings, or of these objects, and of the win rate that a judge gives."""
    given = config.reward_funcs if rewards is None else rewards
    models = of_models(config)
    found = [as_reward(reward, notes, **models) for reward in given]
    return Weighted([*found, *win_rates(config, notes, models)], config.reward_weights)


def of_models(config: RebelConfig) -> dict[str, Any]:
    """The settings of models that score in this process."""
    return {"trust_remote_code": config.trust_remote_code, **({"device": "cpu"} if config.use_cpu else {})}


def build_judges(config: RebelConfig, notes: Notes) -> Weighted:
    """The judges of --judge_funcs, as the components of one reward that nothing is trained on."""
    return Weighted([load_reward(name, notes, "--judge_funcs", **of_models(config)) for name in config.judge_funcs])


def reward_if_any(config: RebelConfig, notes: Notes, rewards: Sequence[Any] | None = None) -> Weighted | None:
    """The reward, or None where none is given and all is scored already: offline, or with rollouts drawn before."""
    given = config.reward_funcs if rewards is None else rewards
    scored = config.offline or config.from_rollouts
    return None if scored and not given and not config.judge else build_reward(config, notes, rewards)
