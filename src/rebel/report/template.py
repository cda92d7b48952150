"""How report.html looks: its style, its one script and its Jinja template. No data and no decisions."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #f7f7f4; --card: #ffffff; --ink: #1b1f27; --soft: #5a6270; --line: #e3e3dc; --grid: #eeeee8;
  --s0: #2458d3; --s1: #8b95a5; --s2: #1c8657; --s3: #c4532b; --s4: #7d4fc4; --s5: #a37a08; --note: #fdf6e3; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #101216; --card: #171a20; --ink: #e7e9ee; --soft: #9aa3b2; --line: #2a2f38; --grid: #23272f;
  --s0: #7ea4ff; --s1: #7c8798; --s2: #4fc48c; --s3: #f28c62; --s4: #b899f5; --s5: #d8b649; --note: #241f12; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 72px; }
h1, h2, h3, p, dl, dd { margin: 0; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 19px; font-weight: 650; letter-spacing: -.01em; margin: 48px 0 14px; }
h3 { font-size: 15px; font-weight: 620; }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .9em; }
sub { line-height: 0; font-size: .75em; }
.eyebrow { color: var(--s0); font-size: 12px; font-weight: 650; letter-spacing: .09em; text-transform: uppercase;
  margin-bottom: 6px; }
.made { color: var(--soft); margin-top: 10px; display: flex; flex-wrap: wrap; gap: 4px 22px; }
.made > div { overflow-wrap: anywhere; min-width: 0; }
.made b { color: var(--ink); font-weight: 500; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; min-width: 0; }
.tiles { display: grid; grid-template-columns: 2.4fr repeat(4, 1fr); gap: 1px; margin-top: 26px; padding: 0;
  overflow: hidden; background: var(--line); }
.tiles > div { background: var(--card); padding: 16px 18px; min-width: 0; }
.tiles dt { color: var(--soft); font-size: 12.5px; line-height: 1.35; }
.tiles dd { font-size: 23px; font-weight: 620; letter-spacing: -.015em; line-height: 1.3; margin: 4px 0 2px; }
.tiles .lead { font-size: 24px; color: var(--s0); }
.tiles .before { color: var(--soft); font-weight: 450; }
.tiles .arrow { color: var(--soft); font-weight: 400; padding: 0 .2em; }
.tiles .pm { font-size: .62em; font-weight: 450; }
.tiles .detail { color: var(--soft); font-size: 12.5px; font-weight: 400; line-height: 1.35; margin: 0;
  letter-spacing: 0; }
.remarks { background: var(--note); margin-top: 14px; padding: 14px 20px; }
.remarks ul { margin: 0; padding-left: 1.1em; }
.remarks li + li { margin-top: 4px; } .remarks li:only-child { list-style: none; margin-left: -1.1em; }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.note { color: var(--soft); font-size: 13.5px; line-height: 1.5; margin-top: 10px; }
.figure { display: flex; flex-direction: column; }
@media (min-width: 901px) { .figure:last-child:nth-child(odd) { grid-column: 1 / -1; display: grid; column-gap: 36px;
  grid-template-columns: repeat(2, minmax(0, 1fr)); grid-template-rows: auto 1fr; }
  .figure:last-child:nth-child(odd) > h3 { grid-column: 1; }
  .figure:last-child:nth-child(odd) > .chart { grid-column: 1; grid-row: 2; }
  .figure:last-child:nth-child(odd) > .note { grid-column: 2; grid-row: 2; margin-top: 24px; max-width: 44ch; } }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; font-size: 12.5px; color: var(--soft); margin: 6px 0 4px;
  align-items: baseline; min-height: 19px; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px;
  background: var(--c); }
.legend .dash { height: 0; width: 14px; border-radius: 0; border-top: 1.5px dashed var(--s5); vertical-align: middle; }
.legend b { color: var(--ink); font-weight: 600; margin-left: 4px; }
.legend .at { margin-left: auto; }
.legend span { overflow-wrap: anywhere; }
.remark { color: var(--soft); font-size: 12px; margin: 4px 0 -2px; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
.rule { stroke: var(--grid); } .rule.zero { stroke: var(--s1); stroke-opacity: .55; }
.guide { stroke: var(--s5); stroke-dasharray: 5 4; }
.path { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.path.faint { stroke-width: 1; stroke-opacity: .3; } .band { fill: var(--c); fill-opacity: .13; }
.bar { stroke: var(--c); stroke-width: 1.4; stroke-opacity: .6; } .dot { fill: var(--c); }
.dots .dot { fill-opacity: .55; } .cursor { fill: var(--card); stroke: var(--c); stroke-width: 2.4; }
.c0 { --c: var(--s0); } .c1 { --c: var(--s1); } .c2 { --c: var(--s2); } .c3 { --c: var(--s3); }
.c4 { --c: var(--s4); } .c5 { --c: var(--s5); }
.phases { display: grid; grid-template-columns: max-content max-content minmax(60px, 1fr); gap: 9px 16px;
  align-items: center; font-size: 13.5px; }
.phases .time { text-align: right; } .phases .meter { display: flex; align-items: center; gap: 10px; color: var(--soft);
  font-size: 12.5px; }
.phases .meter span { flex: none; } .phases .meter i { height: 12px; border-radius: 3px; background: var(--s0);
  opacity: .8; flex: 0 1 auto; min-width: 2px; }
.pair + .pair { margin-top: 14px; }
.pair .prompt { padding-bottom: 12px; }
.sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; border-top: 1px solid var(--line);
  padding-top: 12px; }
.label { color: var(--soft); font-size: 12px; display: flex; gap: 10px; align-items: baseline; margin-bottom: 3px; }
.label b { color: var(--ink); font-size: 13px; font-weight: 620; margin-left: auto; }
.up { color: var(--s2); } .down { color: var(--s3); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 19em; overflow-y: auto; unicode-bidi: isolate;
  font-size: 14px; tab-size: 4; }
.prompt .text { max-height: 9em; font-weight: 500; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin-top: 12px; }
.pictures.small { grid-template-columns: repeat(10, minmax(0, 1fr)); gap: 5px; }
.pictures figure { margin: 0; min-width: 0; } .pictures img { display: block; width: 100%; border-radius: 3px; }
.pictures.small img { image-rendering: pixelated; }
.pictures figcaption { color: var(--soft); font-size: 11.5px; line-height: 1.4; text-align: center; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.none { color: var(--soft); font-style: italic; }
summary { cursor: pointer; color: var(--s0); font-weight: 550; padding: 12px 2px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td { padding: 4px 12px 4px 0; border-top: 1px solid var(--grid); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; color: var(--soft); width: 1%; padding-right: 28px; }
tr:first-child td { border-top: 0; }
.settings { columns: 2; column-gap: 40px; } .settings tr { break-inside: avoid; }
footer { margin-top: 48px; color: var(--soft); font-size: 12.5px; }
@media (max-width: 900px) { .tiles { grid-template-columns: repeat(2, 1fr); }
  .tiles > :first-child { grid-column: 1 / -1; } .grid { grid-template-columns: minmax(0, 1fr); }
  .settings { columns: 1; } }
@media (max-width: 560px) { main { padding: 24px 14px 48px; } h1 { font-size: 24px; } .card { padding: 15px 14px; }
  .tiles { padding: 0; } .tiles > div { padding: 13px 14px; } .tiles .lead { font-size: 22px; }
  .tiles dd { font-size: 20px; } .sides { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  svg text { font-size: 17px; } td:first-child { white-space: normal; width: 45%; padding-right: 14px; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""

SCRIPT = """
for (const chart of document.querySelectorAll('.chart')) {
  const svg = chart.querySelector('svg'), where = chart.querySelector('.at');
  const lines = [...chart.querySelectorAll('[data-points]')].map(mark => ({
    mark, points: JSON.parse(mark.dataset.points), shown: chart.querySelector('[data-of="' + mark.dataset.series + '"]')
  }));
  const alone = chart.dataset.overTime === '0';
  const said = lines.map(line => line.shown.textContent), rest = where.textContent;
  const leave = () => {
    lines.forEach((line, i) => { line.mark.setAttribute('visibility', 'hidden'); line.shown.textContent = said[i]; });
    where.textContent = rest;
  };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    const far = p => alone ? (p[0] - x) ** 2 + (p[1] - y) ** 2 : (p[0] - x) ** 2;
    const found = lines.map(line => line.points.reduce((a, b) => far(b) < far(a) ? b : a));
    const nearest = found.reduce((a, b) => far(b) < far(a) ? b : a);
    lines.forEach((line, i) => {
      const p = found[i], hit = alone ? p === nearest : Math.abs(p[0] - nearest[0]) < 0.5;
      line.mark.setAttribute('visibility', hit ? 'visible' : 'hidden');
      line.mark.setAttribute('cx', p[0]); line.mark.setAttribute('cy', p[1]);
      line.shown.textContent = hit ? p[2][0] : '';
    });
    where.textContent = where.dataset.unit + ' ' + nearest[2][1];
  });
  svg.addEventListener('pointerleave', leave);
}
"""

PAGE = """\
{% macro chart(plot) %}
<div class="chart" data-over-time="{{ 1 if plot.over_time else 0 }}">
  <div class="legend">
    <span>{{ plot.title }}</span>
    {% for line in plot.series %}
    <span class="c{{ line.colour }}"><i></i>{{ line.name }}<b data-of="{{ loop.index }}">{{ line.last }}</b></span>
    {% endfor %}
    {% for _, words in plot.guides %}
    <span><i class="dash"></i>{{ words }}</span>
    {% endfor %}
    <span class="at" data-unit="{{ 'iteration' if plot.over_time else 'at KL' }}"></span>
  </div>
  <svg viewBox="0 0 {{ size[0] }} {{ size[1] }}" role="img" aria-label="{{ plot.title }} against {{ plot.x_title }}">
    {% for y, label, zero in plot.y_ticks %}
    <line class="rule{{ ' zero' if zero else '' }}" x1="{{ frame.left }}" x2="{{ frame.right }}" y1="{{ y }}"
      y2="{{ y }}"/>
    <text x="{{ frame.left - 7 }}" y="{{ y + 4 }}" text-anchor="end">{{ label }}</text>
    {% endfor %}
    {% for x, label in plot.x_ticks %}
    <text x="{{ x }}" y="{{ frame.bottom + 16 }}" text-anchor="middle">{{ label }}</text>
    {% endfor %}
    <text x="{{ frame.right }}" y="{{ size[1] - 3 }}" text-anchor="end">{{ plot.x_title }}</text>
    {% for y, _ in plot.guides %}
    <line class="guide" x1="{{ frame.left }}" x2="{{ frame.right }}" y1="{{ y }}" y2="{{ y }}"/>
    {% endfor %}
    {% for line in plot.series %}
    <g class="c{{ line.colour }}{{ '' if line.line else ' dots' }}">
      {% if line.band %}<polygon class="band" points="{{ line.band }}"/>{% endif %}
      {% if line.faint %}<polyline class="path faint" points="{{ line.faint }}"/>{% endif %}
      {% if line.line %}<polyline class="path" points="{{ line.line }}"/>{% endif %}
      {% for x, low, high in line.bars %}
      <line class="bar" x1="{{ x }}" x2="{{ x }}" y1="{{ low }}" y2="{{ high }}"/>
      {% endfor %}
      {% for x, y in line.dots %}
      <circle class="dot" cx="{{ x }}" cy="{{ y }}" r="{{ 3.4 if line.dots | length < 30 else 2.3 }}"/>
      {% endfor %}
    </g>
    {% endfor %}
    {% for line in plot.series %}
    <circle class="cursor c{{ line.colour }}" r="4.6" visibility="hidden" data-series="{{ loop.index }}"
      data-points="{{ line.data }}"/>
    {% endfor %}
  </svg>
  {% if plot.remark %}<p class="remark">{{ plot.remark }}</p>{% endif %}
</div>
{% endmacro %}
{% macro reward(value) %}{{ number(value) if value is not none else 'no reward' }}{% endmacro %}
{% macro side(name, answer, change) %}
<div>
  <div class="label"><span>{{ name }}</span>{% if answer %}<b>{{ reward(answer.reward) }}</b>
    {% if change %}<span class="{{ 'up' if change > 0 else 'down' }}">{{ '+' if change > 0 else '-' }}{{
      number(change | abs) }}</span>{% endif %}{% endif %}</div>
  {% if answer and answer.text.strip() %}<div class="text" dir="auto">{{ answer.text.strip() }}</div>
  {% elif answer %}<div class="none">{{ 'only white space' if answer.text else 'empty' }}</div>
  {% else %}<div class="none">not drawn</div>{% endif %}
</div>
{% endmacro %}
{% macro compared(pair) %}
<article class="card pair">
  <div class="prompt"><div class="label">prompt</div><div class="text" dir="auto">{{ pair.prompt }}</div></div>
  <div class="sides">
    {{ side('before training' if first == 0 else 'after iteration %d' % first, pair.before, none) }}
    {% if last is not none %}{{ side('after iteration %d' % last, pair.after, pair.change) }}{% endif %}
  </div>
</article>
{% endmacro %}
{% macro pictures() %}
{% if galleries %}
<section>
<h2>{{ 'The same prompts and the same noise, before and after' if galleries | length > 1 else 'Pictures' }}</h2>
<div class="grid">
  {% for gallery in galleries %}
  <div class="card"><h3>{{ gallery.title }}</h3>
    <div class="pictures{{ ' small' if gallery.small else '' }}">
      {% for picture in gallery.pictures %}
      <figure title="{{ picture.prompt }}: reward {{ reward(picture.reward) }}"><img alt="{{ picture.prompt }}"
        src="{{ picture.uri }}"><figcaption>{{ picture.prompt }}</figcaption></figure>
      {% endfor %}
    </div>
  </div>
  {% endfor %}
</div>
</section>
{% endif %}
{% endmacro %}
{% macro completions() %}
{{ pictures() }}
{% if pairs %}
<section>
<h2>{{ 'The same prompts, before and after: most changed first' if last is not none else 'Completions' }}</h2>
{% for pair in pairs[:3] %}{{ compared(pair) }}{% endfor %}
{% if pairs | length > 3 %}
<details><summary>{{ pairs | length - 3 }} more</summary>
{% for pair in pairs[3:] %}{{ compared(pair) }}{% endfor %}
{% if more_pairs %}<p class="note">{{ more_pairs }} others are in samples.jsonl.</p>{% endif %}
</details>
{% endif %}
</section>
{% endif %}
{% endmacro %}
{% macro measured(text) %}{% set parts = text.split(' ± ') %}{{ parts[0] }}{% if parts[1] %}<span class="pm"> ± {{
  parts[1] }}</span>{% endif %}{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{{ script_hash }}'; img-src data:;
  base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · REBEL</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
  <p class="eyebrow">REBEL run</p>
  <h1>{{ name }}</h1>
  <div class="made">{% for what, which in made_of %}<div>{{ what }} <b>{{ which }}</b></div>{% endfor %}</div>
</header>
<dl class="card tiles">
  {% for tile in tiles %}
  <div><dt>{{ tile.name }}</dt>
    <dd{% if loop.first %} class="lead"{% endif %}>
      {%- if tile.before %}<span class="before">{{ measured(tile.before) }}</span>
      <span class="arrow">→</span> {% endif %}
      {{- measured(tile.value) }}</dd>
    <dd class="detail">{{ tile.detail }}</dd></div>
  {% endfor %}
</dl>
{% if progress or remarks %}
<div class="card remarks"><ul>{% if progress %}<li>{{ progress }}</li>{% endif %}
  {% for remark in remarks %}<li>{{ remark }}</li>{% endfor %}</ul></div>
{% endif %}
{% for title, figures in sections %}
<section>
<h2>{{ title }}</h2>
<div class="grid">
  {% for figure in figures %}
  <div class="card figure"><h3>{{ figure.title }}</h3>
    {% for plot in figure.plots %}{{ chart(plot) }}{% endfor %}
    <p class="note">{{ figure.note }}</p></div>
  {% endfor %}
</div>
</section>
{% if loop.first %}{{ completions() }}{% endif %}
{% else %}
{{ completions() }}
{% endfor %}
{% if phases %}
<section>
<h2>Where the time went</h2>
<div class="card phases">
  {% for phase in phases %}
  <span>{{ phase.name }}</span><span class="time">{{ phase.seconds }}</span>
  <div class="meter"><i style="width: {{ '%.1f' % (70 * phase.share) }}%"></i><span>{{ phase.detail }}</span></div>
  {% endfor %}
</div>
</section>
{% endif %}
{% if settings %}
<section>
<h2>Settings</h2>
<details class="card"><summary>{{ settings | length }} settings of this run, from config.yaml</summary>
<div class="settings"><table>
  {% for key, value in settings %}
  <tr><td class="mono">{{ key }}</td><td class="mono">{{ value }}</td></tr>
  {% endfor %}
</table></div>
</details>
</section>
{% endif %}
<footer>KL is in nats per whole completion. ± is one standard error, except where a plot says otherwise. Made from
config.yaml, metrics.jsonl and samples.jsonl; this page loads nothing from anywhere.</footer>
</main>
<script>{{ script }}</script>
</body>
</html>
"""
