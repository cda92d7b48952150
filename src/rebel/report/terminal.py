"""The table of a run on the terminal, a line an iteration, with a progress bar below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from rebel.report.headline import JUDGE
from rebel.report.words import count, duration, finite, fixed, number, share

Advance = Callable[..., None]
"""advance(n=1, tokens=..., **info): n more of the phase are done; tokens add up to a speed, the rest is shown."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table: where its number is in a row, and in the line of the evaluation below it."""

    title: str
    width: int
    key: str = ""
    evaluation: str = ""
    show: Callable[[Any], str] = number
    optional: bool = False


COLUMNS = (
    Column("iteration", 9),
    Column("samples", 10, "samples", show=count, optional=True),
    Column("reward", 8, "reward", "eval/reward"),
    Column("±", 7, "reward_std", "eval/reward_stderr"),
    Column("KL init", 9, "kl_initial", "eval/kl_initial"),
    Column("KL iter", 8, "kl_iteration", show=fixed),
    Column("R² held", 8, "r2_held_out", show=fixed),
    Column("length", 8, "length", "eval/length"),
    Column("no EOS", 7, "unfinished", "eval/unfinished", share),
    Column("tok/s", 8, "tokens_per_second_sampling", show=count, optional=True),
    Column("left", 9, "left", show=duration),
)
JUDGED = (
    Column("win rate", 10, evaluation="eval/win_rate", show=share),
    Column("95% from", 9, evaluation="eval/win_rate_low", show=share),
    Column("to", 5, evaluation="eval/win_rate_high", show=share),
)
"""Further columns of a run that a judge follows."""
PICTURE_COLUMNS = (
    *COLUMNS[:4],
    Column("judge", 8, evaluation="judge", show=fixed),
    *COLUMNS[4:7],
    COLUMNS[-1],
)
"""Those of a run that draws pictures, which have no tokens. The first held-out judge is shown."""
OFFLINE_COLUMNS = (
    Column("iteration", 9),
    Column("samples", 10, "samples", show=count, optional=True),
    Column("loss", 9, "loss", "eval/loss", fixed),
    Column("R²", 8, "r2_held_out", "eval/r2", fixed),
    Column("accuracy", 9, evaluation="eval/accuracy", show=fixed),
    Column("±", 7, evaluation="eval/accuracy_stderr", show=fixed),
    Column("better", 9, "logratio_best", "eval/logratio_best"),
    Column("worse", 9, "logratio_worst", "eval/logratio_worst"),
    Column("gradient", 9, "grad_norm"),
    Column("left", 9, "left", show=duration),
)
OFFLINE_LEGEND = (
    "better, worse: mean log-ratio to the initial policy in nats; accuracy: pairs ordered as their margins are"
)
LEGEND = "KL in nats per completion; ±: spread within groups (eval: standard error)"
HEADER_EVERY = 20


class Terminal:
    """The table of a run, one line an iteration, with a progress bar below it while a phase lasts.

    `disable` leaves out the bars (as does an output that is no terminal), `silent` everything: for the other
    processes of a distributed run.
    """

    def __init__(
        self,
        total_iterations: int | None,
        disable: bool = False,
        silent: bool = False,
        console: Console | None = None,
        judged: bool = False,
        offline: bool = False,
        pictures: bool = False,
    ) -> None:
        self._console = console or Console(quiet=silent)
        self._total = total_iterations
        self._bars = self._console.is_terminal and not (disable or silent)
        self._progress = _progress(self._console)
        columns = (*COLUMNS[:-1], *JUDGED, COLUMNS[-1]) if judged else COLUMNS
        columns = OFFLINE_COLUMNS if offline else PICTURE_COLUMNS if pictures else columns
        self._columns = _columns_within(self._console, columns)
        self._legend = OFFLINE_LEGEND if offline else LEGEND
        self._lines = 0
        self._began: tuple[int, float] | None = None

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Print the line of an iteration, and one of its evaluation if it had one."""
        iteration = int(finite(metrics.get("iteration")) or 0)
        left = self._seconds_left(iteration, finite(metrics.get("seconds/total")))
        judge = next((value for key, value in metrics.items() if key.startswith(JUDGE)), None)
        known = {**metrics, "iteration": iteration, "left": left, "judge": judge}
        trained = finite(metrics.get("reward")) is not None or iteration > 0
        evaluated = any(finite(metrics.get(key)) is not None for key in ("eval/reward", "eval/accuracy"))
        for wanted, cells in ((trained, self._trained(known)), (evaluated, self._evaluated(known))):
            if wanted:
                self._print(cells, style="green" if cells[0] == "eval" else "")

    def say(self, text: str) -> None:
        """Print one line of words."""
        self._line(text, "")

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A progress bar while the block runs; gives `advance(n, tokens=..., **info)`."""
        if not self._bars:
            yield lambda n=1, **info: None
            return
        task = self._progress.add_task(name, total=total, info="")
        self._progress.start()
        try:
            yield _advance(self._progress, task)
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()

    def _trained(self, row: Mapping[str, Any]) -> list[str]:
        done = f"{row.get('iteration')}/{self._total}" if self._total else f"{row.get('iteration')}"
        return [done, *(_cell(row, column.key, column.show) for column in self._columns[1:])]

    def _evaluated(self, row: Mapping[str, Any]) -> list[str]:
        return ["eval", *(_cell(row, column.evaluation, column.show) for column in self._columns[1:])]

    def _print(self, cells: list[str], style: str) -> None:
        if self._lines % HEADER_EVERY == 0:
            if not self._lines:
                self._line(self._legend, "dim")
            self._line(_aligned([column.title for column in self._columns], self._columns), "bold")
        self._lines += 1
        self._line(_aligned(cells, self._columns), style)

    def _line(self, text: str, style: str) -> None:
        if self._console.options.ascii_only:
            text = text.replace("±", "+-").replace("²", "2")
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _seconds_left(self, iteration: int, latest: float | None) -> float | None:
        """The iterations that remain, at the mean pace since the first row; for that row, at its own pace."""
        now = time.monotonic()
        if self._began is None:
            self._began = (iteration, now)
        first, then = self._began
        pace = (now - then) / (iteration - first) if iteration > first else latest
        if pace is None or not iteration or not self._total:
            return None
        return pace * max(self._total - iteration, 0)


def _columns_within(console: Console, columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """All columns, or only the needed ones where a narrow terminal would wrap the lines."""
    width = sum(column.width for column in columns)
    if not console.is_terminal or console.width >= width:
        return columns
    return tuple(column for column in columns if not column.optional)


def _cell(row: Mapping[str, Any], key: str, show: Callable[[Any], str]) -> str:
    value = finite(row.get(key)) if key else None
    return "" if not key else "-" if value is None else show(value)


def _aligned(cells: Iterable[str], columns: tuple[Column, ...]) -> str:
    return "".join(cell.rjust(column.width) for cell, column in zip(cells, columns, strict=True)).rstrip()


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[info]}", style="dim", markup=False),
        console=console,
        transient=True,
    )


def _advance(progress: Progress, task: Any) -> Advance:
    started, tokens_so_far = time.monotonic(), 0

    def advance(n: int = 1, tokens: int = 0, **info: Any) -> None:
        nonlocal tokens_so_far
        tokens_so_far += tokens
        speed = tokens_so_far / max(time.monotonic() - started, 1e-6)
        words = [f"{speed:,.0f} tok/s"] if tokens_so_far else []
        words += [f"{name} {number(finite(value)) if finite(value) else value}" for name, value in info.items()]
        progress.update(task, advance=n, info="  ".join(words))

    return advance
