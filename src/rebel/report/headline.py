"""The headline numbers of a run, where its time went, and what a reader should not miss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rebel.report.words import count, duration, finite, number, share

Row = Mapping[str, Any]

RECENT = 5
MANY_CONTRADICTIONS = 0.1
JUDGE = "eval/judges/"


@dataclass(frozen=True, slots=True)
class Mean:
    """A measured mean with its standard error, and the iteration it was measured after."""

    iteration: float
    value: float
    error: float | None

    def __str__(self) -> str:
        return number(self.value) + (f" ± {number(self.error)}" if self.error is not None else "")


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number; `before` is what it was at first."""

    name: str
    value: str
    before: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """Where time went."""

    name: str
    seconds: str
    share: float
    detail: str


def values(rows: Sequence[Row], key: str) -> list[float]:
    """All finite values of a metric, in order."""
    return [value for row in rows if (value := finite(row.get(key))) is not None]


def recent(rows: Sequence[Row], key: str) -> float | None:
    """The mean of a metric over the last few iterations that have it."""
    last = values(rows, key)[-RECENT:]
    return sum(last) / len(last) if last else None


def last_of(rows: Sequence[Row], key: str) -> float | None:
    """The last value of a metric."""
    return next(reversed(values(rows, key)), None)


def endpoints(rows: Sequence[Row], key: str = "eval/reward") -> tuple[Mean | None, Mean | None]:
    """The evaluated reward before training and after it, each None where it was not evaluated."""
    found = [
        Mean(finite(row.get("iteration")) or 0.0, value, finite(row.get(f"{key}_stderr")))
        for row in rows
        if (value := finite(row.get(key))) is not None
    ]
    before = found[0] if found and found[0].iteration == 0 else None
    after = found[-1] if found and found[-1].iteration > 0 else None
    return before, after


def error_of_gain(before: Mean, after: Mean) -> float | None:
    """The standard error of the change as if the two were independent, though they share their prompts."""
    if before.error is None or after.error is None:
        return None
    return (before.error**2 + after.error**2) ** 0.5


def tiles(rows: Sequence[Row], settings: Row) -> list[Tile]:
    """The headline: reward, distance, and what they cost."""
    kl = last_of([{**row, "kl": row.get("eval/kl_initial", row.get("kl_initial"))} for row in rows], "kl")
    group, prompts = settings.get("num_generations"), settings.get("prompts_per_iteration")
    steps = settings.get("steps_per_iteration")
    samples = count(last_of(rows, "samples"))
    drawn = Tile(
        "Completions drawn", samples, detail=f"{prompts} prompts × {group} an iteration" if prompts and group else ""
    )
    distance = "not measured" if kl is None else "nats per completion"
    offline = bool(settings.get("offline"))
    return [
        accuracy_tile(rows) if offline else reward_tile(rows),
        Tile(
            "KL to the initial policy",
            number(kl),
            detail="of own completions, and none are drawn" if offline else distance,
        ),
        Tile("Recorded completions", samples, detail="those of every epoch") if offline else drawn,
        Tile("Optimiser steps", count(last_of(rows, "step")), detail=f"{steps} in each pass" if steps else ""),
        Tile("Time", duration(math.fsum(map(seconds, rows)) or None), detail=_iterations(rows)),
    ]


def accuracy_tile(rows: Sequence[Row]) -> Tile:
    """How many held-out pairs the policy orders as their margins do, before and after."""
    before, after = endpoints(rows, "eval/accuracy")
    if not after and not before:
        return Tile("Held-out pairs in order", "–", detail="no evaluation was made")
    return Tile(
        "Held-out pairs in order", str(after or before), str(before) if before and after else "", "chance is 0.5"
    )


def reward_tile(rows: Sequence[Row]) -> Tile:
    """Reward before and after: by evaluation where there was one, else of the completions trained on."""
    before, after = endpoints(rows)
    title = "Reward on evaluation prompts" + whose(rows)
    if before and after:
        error = error_of_gain(before, after)
        change = f"{after.value - before.value:+.3f}" + (f" ± {number(error)}" if error is not None else "")
        return Tile(title, str(after), str(before), f"change {change} (standard errors)")
    if before or after:
        detail = "after training" if after else "before training"
        return Tile(title, str(after or before), detail=detail)
    drawn = values(rows, "reward")
    if not drawn:
        return Tile("Reward", "–", detail="not measured yet")
    first = number(drawn[0]) if len(drawn) > 1 else ""
    return Tile("Reward in training", number(drawn[-1]), first, "no evaluation was made")


def whose(rows: Sequence[Row]) -> str:
    """Which policy was evaluated, where it is not simply the last iterate."""
    names = [row["eval/policy"] for row in rows if row.get("eval/policy")]
    words = {"averaged": ", averaged weights", "mixture": ", mixture of iterates"}
    return words.get(names[-1], "") if names else ""


def progress(rows: Sequence[Row], settings: Row) -> str:
    """What is said of a run that has not come to its end; nothing of one that has."""
    planned, done = finite(settings.get("iterations")), last_of(rows, "iteration")
    if done is None:
        return "Nothing has been measured yet."
    if planned is None or done >= planned:
        return ""
    return f"Stopped or still running: {done:,.0f} of {planned:,.0f} iterations are done."


def seconds(row: Row) -> float:
    """How long an iteration took."""
    total = finite(row.get("seconds/total"))
    return math.fsum(sum(values([row], key)) for key in _phase_keys(row)) if total is None else total


def phases(rows: Sequence[Row]) -> list[Phase]:
    """Seconds of each phase over the whole run, longest first."""
    names = dict.fromkeys(key for row in rows for key in _phase_keys(row))
    spent = {key.removeprefix("seconds/"): math.fsum(values(rows, key)) for key in names}
    total = math.fsum(spent.values())
    if total <= 0:
        return []
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return [Phase(name, duration(s), s / total, f"{100 * s / total:.0f}%{_speed(rows, name)}") for name, s in ordered]


def _phase_keys(row: Row) -> list[str]:
    return [key for key in row if key.startswith("seconds/") and key != "seconds/total"]


def _speed(rows: Sequence[Row], phase: str) -> str:
    speeds = {unit: recent(rows, f"{unit}_per_second_{phase}") for unit in ("tokens", "images")}
    return "".join(f", {number(speed)} {unit}/s" for unit, speed in speeds.items() if speed is not None)


def _iterations(rows: Sequence[Row]) -> str:
    done = last_of(rows, "iteration")
    return "" if done is None else f"{done:,.0f} iteration{'' if done == 1 else 's'}"


def remarks(rows: Sequence[Row], settings: Row) -> list[str]:
    """Sentences about what a reader of the plots should not miss."""
    checks = (
        _of_reward,
        _of_win_rate,
        _of_judge,
        _of_held_out_judges,
        _of_regression,
        _of_groups,
        _of_lengths,
        _of_steps,
        _of_losses,
        _of_saving,
    )
    return [sentence for check in checks for sentence in check(rows, settings)]


def _of_reward(rows: Sequence[Row], settings: Row) -> list[str]:
    before, after = endpoints(rows)
    if not before or not after:
        return []
    gain, error = after.value - before.value, error_of_gain(before, after)
    if error is not None and abs(gain) < 2 * error:
        return ["The change of the reward is less than two standard errors: it may be chance."]
    if gain < 0:
        return ["The reward fell. A lower learning rate, a shorter step (eta) or more prompts an iteration may help."]
    return []


def _of_win_rate(rows: Sequence[Row], settings: Row) -> list[str]:
    low, high = last_of(rows, "eval/win_rate_low"), last_of(rows, "eval/win_rate_high")
    consistent = last_of(rows, "eval/swap_consistency")
    said = []
    if low is not None and high is not None and low <= 0.5 <= high:
        said.append("The last win rate may be chance: its interval holds 50%.")
    if consistent is not None and consistent < 0.7:
        said.append(f"The judge gave the same verdict in both orders for only {share(consistent)} of the pairs.")
    return said


def _of_judge(rows: Sequence[Row], settings: Row) -> list[str]:
    swapped = recent(rows, "judge/contradictions")
    if swapped is None or swapped < MANY_CONTRADICTIONS:
        return []
    return [f"With the two swapped the judge named another winner in {share(swapped)} of the latest comparisons."]


def _of_held_out_judges(rows: Sequence[Row], settings: Row) -> list[str]:
    first, last = endpoints(rows)
    if not first or not last or last.value <= first.value:
        return []
    keys = sorted({k for row in rows for k in row if k.startswith(JUDGE) and not k.endswith("_stderr")})
    ways = {key.removeprefix(JUDGE): endpoints(rows, key) for key in keys}
    return [
        f"The reward rose while the held-out judge {name} fell from {number(before.value)} to {number(after.value)}:"
        " the reward is being exploited. A price on the distance (beta) or an earlier end may help."
        for name, (before, after) in ways.items()
        if before and after and before.value - after.value > 2 * (error_of_gain(before, after) or 0.0)
    ]


def _of_regression(rows: Sequence[Row], settings: Row) -> list[str]:
    inside, outside = recent(rows, "r2_in_sample"), recent(rows, "r2_held_out")
    if inside is None or outside is None or inside < 0.3 or outside > 0.05:
        return []
    return [
        f"The regression explains the completions it was fitted to (R² {inside:.2f}) but not new ones"
        f" ({outside:.2f}): it memorises. More prompts an iteration, fewer steps or a lower learning rate may help."
    ]


def _of_groups(rows: Sequence[Row], settings: Row) -> list[str]:
    flat = recent(rows, "flat_groups")
    if flat is None or flat < 0.5:
        return []
    return [f"In {share(flat)} of the latest groups all rewards are equal: they do not say which completion is better."]


def _of_lengths(rows: Sequence[Row], settings: Row) -> list[str]:
    unfinished, together = recent(rows, "unfinished"), recent(rows, "length_reward_correlation")
    said = []
    if unfinished is not None and unfinished > 0.25:
        said.append(f"{share(unfinished)} of the latest completions were cut off by the length limit.")
    if together is not None and abs(together) > 0.5:
        said.append(
            f"Reward and length go together (correlation {together:+.2f}):"
            " check that it is not length itself that is rewarded."
        )
    return said


def _of_steps(rows: Sequence[Row], settings: Row) -> list[str]:
    goal, kl = goal_of_step(settings), recent(rows, "kl_iteration")
    if goal is None or kl is None or kl < 1.5 * goal:
        return []
    return [
        f"The latest iterations moved the policy by {number(kl)} nats each, the goal is {number(goal)}:"
        " a lower learning rate may help."
    ]


def _of_losses(rows: Sequence[Row], settings: Row) -> list[str]:
    completions, groups = (math.fsum(values(rows, f"dropped_{what}")) for what in ("completions", "groups"))
    if not completions and not groups:
        return []
    return [f"Left out of training: {completions:,.0f} completions and {groups:,.0f} whole groups."]


def _of_saving(rows: Sequence[Row], settings: Row) -> list[str]:
    if settings.get("load_best_model_at_end") is not True:
        return []
    return ["The saved model is that of the best evaluation, which need not be the last one shown here."]


def goal_of_step(settings: Row) -> float | None:
    """The KL that `eta: auto` aims at in each iteration."""
    return finite(settings.get("kl_per_iteration")) if settings.get("eta") == "auto" else None
