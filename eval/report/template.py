"""The HTML page: one Jinja template with its style sheet, so that the file stands alone."""

from __future__ import annotations

STYLE = """
:root { --ink: #1f2328; --muted: #57606a; --line: #d8dee4; --soft: #f6f8fa; --page: #ffffff;
  --link: #0550ae; --best: #ddf4e4; --up: #116329; --down: #a40e26; --note: #fff8e1;
  --edge: #d4a72c; color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9da7b3; --line: #30363d; --soft: #161b22; --page: #0d1117;
    --link: #79b8ff; --best: #12351f; --up: #56d364; --down: #ff938a; --note: #2a2310;
    --edge: #9e7c1f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 12px; padding-bottom: 6px;
  border-bottom: 1px solid var(--line); }
p { max-width: 76ch; margin: 10px 0; }
.lead, .note, figcaption, small { color: var(--muted); }
.lead { overflow-wrap: anywhere; }
nav { margin: 14px 0 0; }
nav a { display: inline-block; margin: 0 14px 4px 0; }
a { color: var(--link); text-underline-offset: 2px; }
.notice { background: var(--note); border-left: 4px solid var(--edge); padding: 10px 14px;
  margin: 14px 0; border-radius: 4px; }
.notice ul { margin: 4px 0; padding-left: 18px; }
.scroll { overflow-x: auto; margin: 8px 0; }
.block { margin: 22px 0; }
.caption { font-weight: 600; margin: 0 0 4px; }
.note, figcaption { font-size: 13px; margin: 6px 0; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
thead th { background: var(--soft); font-weight: 600; font-size: 13px; border-top:
  1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); }
thead th:first-child { background: var(--soft); }
.words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; min-width: 7ch; }
td small { display: block; font-size: 12px; line-height: 1.35; }
td.best { background: var(--best); }
td.best b::after { content: " \\2605"; font-weight: 400; }
td.up b { color: var(--up); } td.down b { color: var(--down); }
td b { font-weight: 600; } td.plain b { font-weight: 400; }
figure { margin: 22px 0; }
figure img { display: block; width: 100%; min-width: 620px; max-width: 900px; height: auto; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; padding: 0 14px; }
details[open] { padding-bottom: 10px; }
summary { cursor: pointer; padding: 8px 0; font-weight: 600; overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 10px
  12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 640px) { main { padding: 12px 12px 48px; } h1 { font-size: 21px; }
  th, td { padding: 5px 8px; } body { font-size: 14px; } .words th { min-width: 0; } }
@media print { nav { display: none; } main { max-width: none; padding: 0; }
  body { font-size: 10pt; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 8pt; } th, td { padding: 2px 5px; }
  td small { font-size: 7pt; } figure img { min-width: 0; max-width: 16cm; }
  th:first-child, td:first-child { position: static; }
  td.best { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ document.title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% macro table(block, titled=True) %}
<div class="block">
{% if titled %}<p class="caption">{{ block.title }}</p>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ block.title }}">
<table{% if block.words %} class="words"{% endif %}>
<thead><tr>{% for name in block.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}<tr>
{%- for cell in row %}<td class="{{ cell.mark or 'plain' }}"><b>{{ cell.text }}</b>
{%- for line in cell.small %}<small>{{ line }}</small>{% endfor %}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
</div>
{% if block.note %}<p class="note">{{ block.note }}</p>{% endif %}
</div>
{% endmacro %}
{% macro show(blocks, titled=True) %}
{% for block in blocks %}
{% set kind = kind_of(block) %}
{% if kind == "Text" %}<p>{{ block.text }}</p>
{% elif kind == "Notice" %}<div class="notice" role="note"><b>Before you read on</b>
<ul>{% for item in block['items'] %}<li>{{ item }}</li>{% endfor %}</ul></div>
{% elif kind == "Code" %}<pre>{{ block.text }}</pre>
{% elif kind == "Table" %}{{ table(block, titled) }}
{% elif kind == "Picture" %}<figure>
<p class="caption">{{ block.title }}</p>
<div class="scroll" tabindex="0" role="region" aria-label="{{ block.title }}">
<img src="{{ inline(block) }}" alt="{{ block.title }}. {{ block.caption }}"></div>
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% elif kind == "Fold" %}<details><summary>{{ block.title }}</summary>
{{ show(block.blocks, False) }}</details>
{% endif %}
{% endfor %}
{% endmacro %}
<main>
<h1>{{ document.title }}</h1>
<p class="lead">{{ document.line }}</p>
<nav aria-label="Sections">{% for section in document.sections -%}
<a href="#{{ section.anchor }}">{{ section.title }}</a>{% endfor %}</nav>
{% for section in document.sections %}
<section>
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{{ show(section.blocks) }}
</section>
{% endfor %}
</main>
</body>
</html>
"""
