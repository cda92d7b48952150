"""report.html of a run, and how it is kept safe.

Prompts, completions and settings come from anywhere. All of them go through one door: Jinja's escaping, after
`visible` has spelled out what a browser would act on or not show. The page's only script is named by its hash in
the page's own security policy, so nothing else in it can run, and nothing can be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from rebel.report.chart import HEIGHT, WIDTH, frame
from rebel.report.figures import sections
from rebel.report.headline import phases, progress, remarks, tiles
from rebel.report.pictures import galleries
from rebel.report.rows import METRICS, SAMPLES, read_rows
from rebel.report.template import PAGE, SCRIPT, STYLE
from rebel.report.words import finite, number

Row = Mapping[str, Any]

LONGEST_TEXT = 6000
LONGEST_SETTING = 400
MOST_PROMPTS = 40
STEERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")


@dataclass(frozen=True, slots=True)
class Answer:
    """A completion and its reward."""

    text: str
    reward: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A completion of a prompt at the first evaluation and one at the last; either may be missing."""

    prompt: str
    before: Answer | None
    after: Answer | None

    @property
    def change(self) -> float | None:
        """How much higher the reward is after."""
        if not self.before or not self.after or self.before.reward is None or self.after.reward is None:
            return None
        return self.after.reward - self.before.reward


def write_report(run_dir: Path | str) -> Path:
    """Write report.html of a run folder, finished or not, from its settings, metrics and samples."""
    folder = Path(run_dir)
    page = render(
        folder.resolve().name,
        read_settings(folder / "config.yaml"),
        read_rows(folder / METRICS),
        read_rows(folder / SAMPLES),
        folder,
    )
    fresh, final = folder / "report.html.tmp", folder / "report.html"
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, final)
    return final


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run; none where they cannot be read, since a report is worth having without them."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def render(name: str, settings: Row, metrics: Sequence[Row], samples: Sequence[Row], folder: Path) -> str:
    """The whole page of a run, as text that UTF-8 can hold; pictures are looked for in its folder."""
    rows = sorted(metrics, key=lambda row: finite(row.get("iteration")) or 0.0)
    pairs, first, last = compared([row for row in samples if "image" not in row])
    environment = Environment(autoescape=True, finalize=printable, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        name=name,
        made_of=_made_of(settings),
        progress=progress(rows, settings),
        tiles=tiles(rows, settings),
        remarks=remarks(rows, settings),
        sections=sections(rows, settings),
        phases=phases(rows),
        galleries=galleries(samples, folder),
        pairs=pairs[:MOST_PROMPTS],
        more_pairs=len(pairs[MOST_PROMPTS:]),
        first=first,
        last=last,
        settings=[(str(key), _short(value, LONGEST_SETTING)) for key, value in settings.items()],
        number=number,
        frame=frame(),
        size=(WIDTH, HEIGHT),
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
    )


def visible(text: str) -> str:
    """The text with control characters, direction overrides and lone surrogates spelled out, such as \\u202e."""
    text = text.replace("\r\n", "\n")
    return text if text.isascii() and text.isprintable() else "".join(map(_spelled, text))


def _spelled(char: str) -> str:
    if char in "\n\t":
        return char
    if char in STEERING or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char


def printable(value: Any) -> Any:
    """What the template prints of an expression; it escapes the result unless it is markup of our own."""
    return value if isinstance(value, Markup) else visible(str(value))


def _short(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    left_out = len(text) - longest
    return text if left_out <= 0 else f"{text[:longest]} … ({left_out:,} more characters)"


def _made_of(settings: Row) -> list[tuple[str, str]]:
    """The model, the prompts and the rewards of the run, as far as the settings name them."""
    rewards, judges = settings.get("reward_funcs"), settings.get("judge_funcs")
    named = {
        "model": settings.get("model_name_or_path") or settings.get("pipeline_name_or_path"),
        "prompts": settings.get("dataset_name"),
        "reward": _listed(rewards),
        "held-out judge": _listed(judges),
    }
    return [(what, _short(name, LONGEST_SETTING)) for what, name in named.items() if name]


def _listed(names: Any) -> Any:
    return ", ".join(map(str, names)) if isinstance(names, list) else names


def compared(samples: Sequence[Row]) -> tuple[list[Pair], float | None, float | None]:
    """Completions of the same prompts at the first and at the last evaluation, and the iterations of these.

    With one evaluation only, the last is None and no pair has an "after".
    """
    iterations = sorted({at for row in samples if (at := finite(row.get("iteration"))) is not None})
    if not iterations:
        return [], None, None
    before = _answers(samples, iterations[0])
    after = _answers(samples, iterations[-1]) if len(iterations) > 1 else {}
    pairs = [
        Pair(prompt, *answers)
        for prompt in {**before, **after}
        for answers in zip_longest(before.get(prompt, []), after.get(prompt, []))
    ]
    return sorted(pairs, key=change_first), iterations[0], iterations[-1] if after else None


def change_first(pair: Pair) -> float:
    """Sorts pairs so that those whose reward changed most come first."""
    return -abs(pair.change or 0.0)


def _answers(samples: Sequence[Row], iteration: float) -> dict[str, list[Answer]]:
    """The completions of one evaluation by prompt."""
    answers: dict[str, list[Answer]] = {}
    for row in samples:
        if finite(row.get("iteration")) == iteration:
            answer = Answer(_short(row.get("completion"), LONGEST_TEXT), finite(row.get("reward")))
            answers.setdefault(_short(row.get("prompt"), LONGEST_TEXT), []).append(answer)
    return answers
