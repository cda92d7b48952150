"""A win rate for people: lines and a table of examples for the terminal, and a page in one HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rebel.report.page import printable, visible
from rebel.report.template import STYLE
from rebel.report.words import finite, number, share

Result = Mapping[str, Any]

LONGEST = 320
"""Characters of a text in the terminal's table."""

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ percent(result.win_rate) }} {{ result.ours }}</title>
<style>{{ style }}</style>
<main>
  <p class="eyebrow">Win rate</p>
  <h1>{{ result.ours }} against {{ result.theirs }}</h1>
  <dl class="card tiles">
    <div><dt>Win rate</dt><dd class="lead">{{ percent(result.win_rate) }}</dd>
      <dd class="detail">95% interval {{ percent(result.low) }} to {{ percent(result.high) }}</dd></div>
    <div><dt>Wins</dt><dd>{{ percent(result.wins) }}</dd><dd class="detail">of {{ result.pairs }} pairs</dd></div>
    <div><dt>Ties</dt><dd>{{ percent(result.ties) }}</dd></div>
    <div><dt>Losses</dt><dd>{{ percent(result.losses) }}</dd></div>
    <div><dt>Same verdict in both orders</dt><dd>{{ percent(result.swap_consistency) }}</dd></div>
  </dl>
  <div class="card remarks"><ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul></div>
  <h2>Completions</h2>
  {% for row in rows %}
  <div class="card pair">
    <div class="prompt"><div class="label">Prompt</div><div class="text">{{ row.prompt }}</div></div>
    <div class="sides">
      <div><div class="label">ours <b>P {{ number(row.score) }}</b></div><div class="text">{{ row.ours }}</div></div>
      <div><div class="label">theirs</div><div class="text">{{ row.theirs }}</div></div>
    </div>
  </div>
  {% endfor %}
  {% if more %}<p class="note">{{ more }} more pairs are in evaluation.json.</p>{% endif %}
</main>
</html>
"""

MOST_ROWS = 60


def lines_of(result: Result) -> list[str]:
    """The result in sentences, the win rate first."""
    length = result["length"]
    said = [
        f"win rate {percent(result['win_rate'])} (95%: {percent(result['low'])} to {percent(result['high'])}): "
        f"{percent(result['wins'])} wins, {percent(result['ties'])} ties, {percent(result['losses'])} losses of "
        f"{result['pairs']} pairs, {result['prompts']} prompts",
        f"judge    {result['judge']}, each pair in both orders: the same verdict for "
        f"{percent(result['swap_consistency'])} of the pairs; {percent(result['first_place'])} went to the first place",
        f"ours     {result['ours']}",
        f"theirs   {result['theirs']}",
        f"length   {number(length['ours'])} against {number(length['theirs'])} tokens; the longer one was preferred in "
        f"{percent(length['longer_preferred'])} of the pairs",
    ]
    if result["lengths_differ"]:
        said.append(
            f"         lengths differ much; at equal length the win rate is about {percent(length['controlled'])} "
            "(logistic regression on the difference)"
        )
    if result["unanswered"]:
        said.append(f"left out {result['unanswered']} pairs that the judge did not answer in both orders")
    said += [f"left out {text}" for text in result.get("left_out", [])]
    rewards = result.get("rewards", {})
    return said + [f"reward   {name}: {number(a)} against {number(b)}" for name, (a, b) in rewards.items()]


def percent(value: Any) -> str:
    found = finite(value)
    return share(found) if found is None or found in (0, 1) else f"{100 * found:.1f}%"


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Pairs side by side, with P(ours is better)."""
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    table.add_column("ours", ratio=3)
    table.add_column("theirs", ratio=3)
    table.add_column("P", justify="right")
    for row in rows:
        cells = [Text(visible(shortened(str(row[name])))) for name in ("prompt", "ours", "theirs")]
        table.add_row(*cells, number(finite(row["score"])))
    return table


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 2].rstrip() + " …"


def show(result: Result, examples: int, console: Console | None = None) -> None:
    """Print a result, and its first pairs."""
    console = console or Console()
    for line in lines_of(result):
        console.print(visible(line), markup=False, highlight=False, soft_wrap=True)
    if examples:
        console.print(table_of(result["rows"][:examples]))


def write_page(result: Result, path: Path) -> Path:
    """Write the page of a result; texts from anywhere are escaped, and it loads and runs nothing."""
    environment = Environment(autoescape=True, finalize=printable, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE).render(
        result=result,
        rows=result["rows"][:MOST_ROWS],
        more=max(0, len(result["rows"]) - MOST_ROWS),
        lines=lines_of(result)[1:],
        percent=percent,
        number=lambda value: number(finite(value)),
        style=Markup(STYLE),
    )
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)
    return path
