"""Plots as plain geometry: series of numbers in, places of lines, ticks and labels out. A template draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rebel.report.words import count, number, share

WIDTH, HEIGHT = 520.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 14.0, 12.0, 34.0
MOST_POINTS = 500
SMOOTH_FROM = 60


@dataclass(frozen=True, slots=True)
class Point:
    """A value, with the half-width of its band or error bar."""

    x: float
    y: float
    spread: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name and colour. `marks`: measured now and then, so each point is drawn, with its error."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    marks: bool = False
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values, the places in it that get a label, and how to write them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    percent: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Where a value lies between two coordinates; beyond the range, at its end."""
        part = (value - self.low) / (self.high - self.low)
        return round(start + min(max(part, 0.0), 1.0) * (end - start), 1)

    def label(self, value: float) -> str:
        """A tick's label, with as many digits as tell it from its neighbours."""
        if self.percent:
            return f"{100 * value:.3g}%"
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(value)
        if abs(value) >= 1e6 or 0 < step < 1e-4:
            return f"{value:.3g}"
        digits = next((d for d in range(5) if math.isclose(round(step, d), step, rel_tol=1e-6)), 5)
        return f"{value:,.{digits}f}"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series in the coordinates of its plot; `data` is what hovering shows: [x, y, words] of each point."""

    name: str
    colour: int
    line: str
    faint: str
    band: str
    dots: tuple[tuple[float, float], ...]
    bars: tuple[tuple[float, float, float], ...]
    last: str
    data: str


@dataclass(frozen=True, slots=True)
class Plot:
    """All that a template needs to draw one plot."""

    title: str
    x_title: str
    over_time: bool
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str, bool], ...]
    guides: tuple[tuple[float, str], ...]
    series: tuple[Drawn, ...]
    remark: str


def axis(values: Iterable[float], whole: bool = False, percent: bool = False, snap: bool = True) -> Axis:
    """A range around the values with four to seven round ticks; `snap` lets it begin and end on one."""
    known = sorted(values)
    low, high = known[0], known[-1]
    if high - low <= 1e-3 * max(abs(low), abs(high)):
        margin = 0.05 if percent else max(0.1 * abs(high), 1.0 if whole else 1e-3)
        low, high = low - margin, high + margin
    if percent:
        low, high = min(max(low, 0.0), 0.9), min(max(high, 0.02), 1.0)
    step = _round_step((high - low) / 5, whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(tick * step for tick in range(first, last + 1))
    if snap:
        return Axis(ticks[0], ticks[-1], ticks, percent)
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), percent)


def _round_step(rough: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return max(1.0, float(math.ceil(step))) if whole else step


def _typical(values: Sequence[float]) -> list[float]:
    """The values without the few that would flatten all others: more than ten times the bulk away."""
    if len(values) < 8:
        return list(values)
    ordered = sorted(values)
    low, middle, high = (ordered[int(part * (len(ordered) - 1))] for part in (0.05, 0.5, 0.95))
    reach = 10 * max(high - low, 1e-12)
    return [value for value in ordered if abs(value - middle) <= reach]


def plot(
    title: str,
    series: Sequence[Series],
    x_title: str = "iteration",
    percent: bool = False,
    include: Sequence[float] = (),
    guides: Sequence[tuple[float, str]] = (),
    floor: float = -math.inf,
) -> Plot | None:
    """The plot of the series that have points; None if none has. Values below `floor` lie on the frame."""
    series = [_thinned(each) for each in series if each.points]
    if not series:
        return None
    over_time = x_title == "iteration"
    xs = [point.x for each in series for point in each.points]
    ys = [max(point.y, floor) for each in series for point in each.points]
    edges = [max(edge, floor) for each in series for point in each.points for edge in _edges(point)]
    shown = [*_typical(ys), *(_typical(edges) if edges else ()), *include, *(level for level, _ in guides)]
    y_axis = axis(shown, percent=percent)
    x_axis = axis(xs if over_time else [0.0, *_typical(xs)], whole=over_time, snap=not over_time)
    outside = sum(not y_axis.low <= point.y <= y_axis.high for each in series for point in each.points)
    return Plot(
        title,
        x_title,
        over_time,
        tuple((x_axis.place(tick, LEFT, WIDTH - RIGHT), x_axis.label(tick)) for tick in x_axis.ticks),
        tuple((_down(y_axis, tick), y_axis.label(tick), abs(tick) < 1e-12) for tick in y_axis.ticks),
        tuple((_down(y_axis, level), words) for level, words in guides),
        tuple(_drawn(each, x_axis, y_axis, over_time) for each in series),
        _remark(series, outside),
    )


def frame() -> dict[str, float]:
    """The edges of the area that data is drawn in."""
    return {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}


def _edges(point: Point) -> tuple[float, ...]:
    return () if point.spread is None else (point.y - point.spread, point.y + point.spread)


def _down(scale: Axis, value: float) -> float:
    return scale.place(value, HEIGHT - BOTTOM, TOP)


def _drawn(series: Series, x_axis: Axis, y_axis: Axis, over_time: bool) -> Drawn:
    places = [(x_axis.place(p.x, LEFT, WIDTH - RIGHT), _down(y_axis, p.y)) for p in series.points]
    smooth = [_down(y_axis, value) for value in _running_mean([p.y for p in series.points], _window(series))]
    bold = [(x, y) for (x, _), y in zip(places, smooth, strict=True)]
    spans = [
        (x, _down(y_axis, p.y - p.spread), _down(y_axis, p.y + p.spread))
        for (x, _), p in zip(places, series.points, strict=True)
        if p.spread is not None
    ]
    hints = [[*place, _hint(p, y_axis, over_time)] for place, p in zip(places, series.points, strict=True)]
    banded = len(spans) > 1 and not series.marks
    return Drawn(
        series.name,
        series.colour,
        line=_path(bold) if series.joined and len(bold) > 1 else "",
        faint=_path(places) if series.joined and _window(series) > 1 else "",
        band=_path([(x, y) for x, y, _ in spans] + [(x, y) for x, _, y in reversed(spans)]) if banded else "",
        dots=tuple(places) if series.marks or not series.joined or len(places) < 13 else (),
        bars=tuple(spans) if series.marks else (),
        last=_words(series.points[-1], y_axis),
        data=json.dumps(hints, ensure_ascii=True),
    )


def _path(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


def _words(point: Point, scale: Axis) -> str:
    show = share if scale.percent else number
    return show(point.y) + (f" ± {show(point.spread)}" if point.spread is not None else "")


def _hint(point: Point, y_axis: Axis, over_time: bool) -> list[str]:
    return [_words(point, y_axis), count(point.x) if over_time else number(point.x)]


def _window(series: Series) -> int:
    """How many points the bold line averages: 1 for short series and for those that are drawn as marks."""
    if series.marks or not series.joined or len(series.points) < SMOOTH_FROM:
        return 1
    return max(3, len(series.points) // 25)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` at most."""
    return [sum(values[max(0, end - window) : end]) / min(window, end) for end in range(1, len(values) + 1)]


def _thinned(series: Series) -> Series:
    """The series with runs of neighbours replaced by their mean where there are too many to see."""
    size = _bin(series)
    if size == 1:
        return series
    chunks = [series.points[start : start + size] for start in range(0, len(series.points), size)]
    return Series(series.name, tuple(map(_mean, chunks)), series.colour, series.marks, series.joined)


def _bin(series: Series) -> int:
    return math.ceil(len(series.points) / MOST_POINTS)


def _mean(points: Sequence[Point]) -> Point:
    spreads = [point.spread for point in points if point.spread is not None]
    return Point(
        points[-1].x,
        sum(point.y for point in points) / len(points),
        sum(spreads) / len(spreads) if spreads else None,
    )


def _remark(series: Sequence[Series], outside: int) -> str:
    windows = [_window(each) for each in series]
    words = [f"Bold: mean of the last {max(windows)} points."] if max(windows) > 1 else []
    if outside:
        words.append(f"{outside} {'value lies' if outside == 1 else 'values lie'} beyond the frame.")
    return " ".join(words)
