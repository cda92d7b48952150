"""How good the policy is now: its reward on held-out prompts, and how far it has gone from the initial policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rebel.types import Completion, Scored

LogProbs = Callable[[Sequence], Float[Tensor, " N"]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Numbers of one evaluation, and some of its completions for the eye."""

    metrics: dict[str, float]
    samples: list[dict]
    policy: str = "last"
    """Which policy it is of: the last iterate, the averaged one, or the mixture of those that are kept."""


def evaluate(scored: Sequence[Scored], policy: LogProbs, reference: LogProbs | None, show: int = 8) -> Evaluation:
    """Mean reward with its standard error over prompts, KL to the initial policy in nats, and lengths."""
    completions = [c for group in scored for c in group.rollout.completions]
    metrics = {
        **reward_metrics(scored),
        **({"eval/length": mean(map(length, completions))} if any(map(length, completions)) else {}),
        "eval/unfinished": mean(float(not c.finished) for c in completions),
    }
    if reference is not None:
        traces = [c.trace for c in completions]
        metrics["eval/kl_initial"] = float((policy(traces) - reference(traces)).mean())
    return Evaluation(metrics, [sample_row(group) for group in scored[:show]])


def reward_metrics(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over prompts, so that prompts and not completions count, with the standard error of that mean."""
    rewards = torch.stack([rewards_of(group).double().nanmean() for group in scored])
    rewards = rewards[~rewards.isnan()]
    names = scored[0].components if len(scored) else {}
    components = {name: torch.cat([group.components[name].double() for group in scored]).nanmean() for name in names}
    return {
        "eval/reward": float(rewards.mean()),
        "eval/reward_stderr": float(rewards.std() / math.sqrt(len(rewards))) if len(rewards) > 1 else math.nan,
        **{f"eval/rewards/{name}": float(value) for name, value in components.items()},
    }


def rewards_of(group: Scored) -> Float[Tensor, " G"]:
    assert group.rewards is not None, "evaluation is by rewards"
    return group.rewards


def sample_row(group: Scored) -> dict:
    """The first completion of a prompt: as text, or the picture itself under `image`."""
    reward, content = float(rewards_of(group)[0]), group.rollout.completions[0].content
    return {
        "prompt": text(group.rollout.prompt.content),
        **({"image": content} if is_picture(content) else {"completion": text(content)}),
        "reward": None if math.isnan(reward) else reward,
    }


def is_picture(content: object) -> bool:
    """Whether it is an image of PIL, without asking for PIL where nobody draws any."""
    return hasattr(content, "save") and hasattr(content, "getbands")


def text(content: object) -> str:
    """What a person reads of a prompt or a completion."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(m, dict) for m in content):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in content)
    return repr(content)


def length(completion: Completion) -> int:
    """Tokens of a completion; 0 where a trace has no length."""
    trace = completion.trace
    return len(getattr(trace, "completion", ()))


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan
