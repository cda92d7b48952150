"""Win rates as the settings ask for them: the judge, how it is asked, and whom evaluations compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rebel.config import RebelConfig
from rebel.rewards.combine import Weighted
from rebel.rewards.functions import Notes
from rebel.rewards.judge_load import Service, load_judge
from rebel.rewards.winrate import AgainstFirst, WinRate
from rebel.types import Reward

ANSWERS, JUDGED = "judge_answers.sqlite", "opponents.jsonl"
"""In the run's folder: what a judge behind an endpoint has answered, and whom evaluations compare with."""


def service_of(config: RebelConfig) -> Service:
    """How a judge behind an endpoint is asked; its answers stay in the run's folder."""
    return Service(
        config.judge_base_url,
        config.judge_api_key_env,
        config.judge_args,
        config.judge_concurrency,
        config.judge_deadline,
        Path(config.output_dir) / ANSWERS,
    )


def win_rates(config: RebelConfig, notes: Notes, models: Mapping[str, Any]) -> list[WinRate]:
    """The win rate by the judge of the settings, if they name one."""
    if not config.judge:
        return []
    judge = load_judge(config.judge, notes, config.judge_template, service_of(config), **models)
    return [WinRate(judge, config.judge_unit, config.judge_opponents, config.judge_swap, notes)]


def for_evaluation(reward: Reward, folder: Path) -> Reward:
    """The reward with win rates against the initial policy: against one's own group they are 1/2 by symmetry."""
    if not isinstance(reward, Weighted):
        return reward
    parts = [AgainstFirst(r, folder / JUDGED) if isinstance(r, WinRate) else r for r in reward.rewards]
    return Weighted(parts, reward.weights, reward.scale)
