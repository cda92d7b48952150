"""The plots of a run and what is said beside each: one function a figure, data and explanation together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rebel.report.chart import Plot, Point, Series, plot
from rebel.report.headline import JUDGE, goal_of_step
from rebel.report.words import finite, number

Row = Mapping[str, Any]

STRONG, PLAIN, GOOD, BAD = range(4)
"""Colours: what counts (evaluations, held out), what was trained on, better, worse."""

MANY = (STRONG, BAD, GOOD, 4, 5, PLAIN)


@dataclass(frozen=True, slots=True)
class Figure:
    """Plots that belong together, with how to read them; `note` is markup of ours."""

    title: str
    note: Markup
    plots: tuple[Plot, ...]


def sections(rows: Sequence[Row], settings: Row) -> list[tuple[str, list[Figure]]]:
    """The figures that have anything to show, by section."""
    every = {
        "Outcome": (
            _accuracy(rows, settings),
            _reward(rows, settings),
            _judges(rows),
            _frontier(rows),
            _components(rows),
            _win_rate(rows, settings),
        ),
        "Distance": (_kl_initial(rows, settings), _kl_iteration(rows, settings), _step(rows)),
        "Regression": (_fit(rows), _log_ratios(rows), _loss(rows), _gradient(rows)),
        "Completions": (_length(rows), _unfinished(rows), _flat(rows), _entropy(rows)),
    }
    shown = {title: [figure for figure in figures if figure.plots] for title, figures in every.items()}
    return [(title, figures) for title, figures in shown.items() if figures]


def _points(rows: Sequence[Row], key: str, spread: str = "", x: str = "iteration") -> tuple[Point, ...]:
    found = ((finite(row.get(x)), finite(row.get(key)), finite(row.get(spread))) for row in rows)
    return tuple(Point(at, value, error) for at, value, error in found if at is not None and value is not None)


def _line(rows: Sequence[Row], name: str, key: str, colour: int = PLAIN, spread: str = "") -> Series:
    return Series(name, _points(rows, key, spread), colour)


def _evaluated(rows: Sequence[Row], key: str, spread: str = "") -> Series:
    return Series("evaluation", _points(rows, key, spread), STRONG, marks=True)


def _figure(title: str, note: str, *plots: Plot | None) -> Figure:
    return Figure(title, Markup(note), tuple(each for each in plots if each is not None))


def _accuracy(rows: Sequence[Row], settings: Row) -> Figure:
    rows = rows if settings.get("offline", True) else ()  # else it is something that a reward noted down
    return _figure(
        "Order of held-out pairs",
        "Share of pairs of recorded completions, never trained on, that the policy's log-ratios to the initial policy"
        " order as their margins do, with one standard error. One half is chance, and where training begins.",
        plot("share of pairs", [_evaluated(rows, "eval/accuracy", "eval/accuracy_stderr")], percent=True),
    )


def _reward(rows: Sequence[Row], settings: Row) -> Figure:
    return _figure(
        "Reward",
        "Dots: the evaluation prompts, with one standard error. Line: the completions drawn for training at the"
        " start of each iteration; its band is the mean spread within a group. Only differences within a group"
        " teach: adding a number to all rewards of a prompt would change nothing." + _heat(settings),
        plot(
            "mean reward",
            [
                _line(rows, "training", "reward", PLAIN, "reward_std"),
                _evaluated(rows, "eval/reward", "eval/reward_stderr"),
            ],
        ),
    )


def _heat(settings: Row) -> str:
    """What sets evaluations apart from training, where they are drawn at another temperature."""
    heat = finite(settings.get("eval_temperature"))
    if heat is None or heat == settings.get("temperature"):
        return ""
    how = "greedy" if heat == 0 else f"drawn at temperature {number(heat)}"
    return f" Evaluations are {how}, and training is not: the same policy has another reward in each."


def _judges(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Held-out judges",
        "What judges that were never the reward make of the completions of the evaluation, with one standard error."
        " While they rise with the reward, the reward measures what is meant; where they turn and fall, it is being"
        " exploited, and the run should have ended or paid for its distance (beta).",
        *(
            plot(key.removeprefix(JUDGE), [_evaluated(rows, key, f"{key}_stderr")])
            for key in sorted({key for row in rows for key in row if key.startswith(JUDGE)})
            if not key.endswith("_stderr")
        ),
    )


def _frontier(rows: Sequence[Row]) -> Figure:
    evaluated = _points(rows, "eval/reward", "eval/reward_stderr", x="eval/kl_initial")
    drawn = _points(rows, "reward", x="kl_initial")
    return _figure(
        "Reward against KL",
        "What the reward cost in distance from the initial policy. Compare two runs here, at equal KL: the one whose"
        " curve is higher and further left is better. No policy can lie above the curve of"
        " π<sub>ref</sub>·exp(r/β) as β varies.",
        plot(
            "mean reward",
            [
                Series("training", drawn, PLAIN, joined=False),
                Series("evaluation", evaluated, STRONG, marks=True),
            ],
            x_title="KL to the initial policy, nats per completion",
        ),
    )


def _components(rows: Sequence[Row]) -> Figure:
    keys = sorted({key for row in rows for key in row if key.startswith("rewards/")})
    lines = [_line(rows, key.removeprefix("rewards/"), key, MANY[place % len(MANY)]) for place, key in enumerate(keys)]
    return _figure(
        "Parts of the reward",
        "Each reward function's own mean, before its weight. A part that falls while the sum rises is"
        " being traded away.",
        plot("mean value", lines) if len(lines) > 1 else None,
    )


def _win_rate(rows: Sequence[Row], settings: Row) -> Figure:
    rows = rows if settings.get("eval_against", True) else ()
    sure = [
        Series("95% from", _points(rows, "eval/win_rate_low"), PLAIN),
        Series("95% to", _points(rows, "eval/win_rate_high"), PLAIN),
    ]
    return _figure(
        "Win rate",
        "How often the judge prefers the policy's completion of an evaluation prompt to the other side's, both orders"
        " averaged and a tie counted as half, with the bootstrap interval over prompts. Swap consistency: the share of"
        " pairs with the same verdict in both orders: where it is low, the judge goes by the place.",
        plot(
            "share of prompts won",
            [_evaluated(rows, "eval/win_rate"), *sure] if _points(rows, "eval/win_rate") else [],
            percent=True,
            guides=[(0.5, "equal")],
        ),
        plot("swap consistency", [_evaluated(rows, "eval/swap_consistency")], percent=True),
    )


def _kl_initial(rows: Sequence[Row], settings: Row) -> Figure:
    beta = finite(settings.get("beta"))
    price = (
        f"Here each nat costs β = {beta:g} of reward, and the line levels off where more reward is not worth more"
        " distance."
        if beta
        else "With β = 0 distance has no price, so the line keeps rising for as long as there is reward to gain."
    )
    return _figure(
        "KL to the initial policy",
        "How far the policy has gone from where it began: KL(π<sub>t</sub> ‖ π<sub>ref</sub>), in nats per whole"
        f" completion (not per token). {price if beta is not None else ''}",
        plot(
            "nats per completion",
            [_line(rows, "training", "kl_initial"), _evaluated(rows, "eval/kl_initial")],
            include=(0.0,),
        ),
    )


def _kl_iteration(rows: Sequence[Row], settings: Row) -> Figure:
    goal = goal_of_step(settings)
    return _figure(
        "KL of each iteration",
        "How far one iteration moves the policy: KL(π<sub>t+1</sub> ‖ π<sub>t</sub>), estimated from log-ratios. The"
        " regression has seen completions of π<sub>t</sub> only; after a long step most of what the new policy writes"
        " is beyond what it was fitted to." + (" <code>eta: auto</code> aims at the dashed line." if goal else ""),
        plot(
            "nats per completion",
            [_line(rows, "iteration", "kl_iteration", STRONG)],
            include=(0.0,),
            guides=[(goal, f"goal {goal:g}")] if goal else [],
        ),
    )


def _step(rows: Sequence[Row]) -> Figure:
    line = _line(rows, "η′", "eta", STRONG)
    changes = len({point.y for point in line.points}) > 1
    return _figure(
        "Step η′",
        "In nats per unit of reward: the regression asks that a completion whose reward is higher by 1 gains η′ nats of"
        " log-probability over the other.",
        plot("nats per unit of reward", [line], include=(0.0,)) if changes else None,
    )


def _fit(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Fit of the regression, R²",
        "How much of the reward differences within groups the policy's log-ratios explain: 1 is all of it, 0 what an"
        " unmoved policy explains, below 0 is worse than not moving. Held out means not yet trained on in that"
        " iteration. High in sample but not held out is memorising; near 0 in both, the steps fall short of η′.",
        plot(
            "R²",
            [
                _line(rows, "in sample", "r2_in_sample"),
                _line(rows, "held out", "r2_held_out", STRONG),
                _evaluated(rows, "eval/r2"),
            ],
            include=(0.0,),
            floor=-1.0,
        ),
    )


def _log_ratios(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Best and worst completion of a group",
        "Mean log π<sub>t+1</sub>/π<sub>t</sub> of each. <strong>Both may fall, and that is normal</strong>: REBEL"
        " regresses differences, so what all completions of a prompt share is free, and over fresh completions of"
        " π<sub>t</sub> the mean log-ratio is −KL(π<sub>t</sub> ‖ π<sub>t+1</sub>), never above zero. What should"
        " open is the gap: best above worst.",
        plot(
            "nats per completion",
            [_line(rows, "best", "logratio_best", GOOD), _line(rows, "worst", "logratio_worst", BAD)],
            include=(0.0,),
        ),
    )


def _loss(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Loss",
        "The paper's loss, in squared units of the reward. Before the first step of an iteration it is the mean squared"
        " difference of rewards, so it follows the spread of the rewards: judge the fit by R².",
        plot("squared reward", [_line(rows, "loss", "loss")], include=(0.0,)),
    )


def _gradient(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Gradient norm",
        "Of η′ times the loss, before clipping: it does not depend on η at the start of an iteration.",
        plot("norm", [_line(rows, "gradient", "grad_norm")], include=(0.0,)),
    )


def _length(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Length",
        "Tokens per completion. A reward that grows with length shows up here first.",
        plot("tokens", [_line(rows, "training", "length"), _evaluated(rows, "eval/length")]),
    )


def _unfinished(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Unfinished",
        "Share of completions without an end of their own: text that ran into the length limit, whose reward is that"
        " of a fragment, and images that a safety checker blacked out.",
        plot(
            "share of completions",
            [_line(rows, "training", "unfinished"), _evaluated(rows, "eval/unfinished")],
            percent=True,
            include=(0.0,),
        ),
    )


def _flat(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Flat groups",
        "Share of prompts whose completions all got the same reward. Such a group does not say which completion is"
        " better: prompts that are always solved, or never, cost samples and teach nothing.",
        plot("share of groups", [_line(rows, "training", "flat_groups")], percent=True, include=(0.0,)),
    )


def _entropy(rows: Sequence[Row]) -> Figure:
    return _figure(
        "Entropy",
        "Nats per token: how undecided the policy is. Near zero the completions of a prompt become alike, and their"
        " rewards have no differences left to learn from.",
        plot("nats per token", [_line(rows, "training", "entropy")], include=(0.0,)),
    )
