"""What a report says and in which order; how it looks is up to the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uncomp.eval.report import facts as run
from uncomp.eval.report import figures, stats, tables
from uncomp.eval.report.analysis import Analysis
from uncomp.eval.report.blocks import Block, Code, Fold, Notice, Picture, Section, Text
from uncomp.eval.report.cases import Group
from uncomp.eval.report.inputs import Held, Throughput
from uncomp.eval.report.plots import case_name
from uncomp.eval.run.records import Scored

# Changed answers listed per case; the file flips.csv has them all.
LISTED = 100
HOW = (
    "Brackets are {confidence:.0f} % bootstrap intervals ({resamples} replicates, seed {seed}): "
    "samples are resampled within each task, turns of one sample stay together, and differences "
    "are paired by sample. BCa, or the percentile method where the interval says so. n counts "
    "samples, p is an exact sign test, neither corrected for the number of comparisons. A mean "
    "over tasks is the mean of the tasks' means. Keep ratios are as asked for; what was kept is "
    "measured and shown beside them."
)


@dataclass(frozen=True)
class Document:
    """A report: title, one line below it, sections."""

    title: str
    line: str
    sections: tuple[Section, ...]

    def pictures(self) -> list[Picture]:
        """All plots, those in folds too."""
        return [p for section in self.sections for p in _pictures(section.blocks)]


def document(
    analysis: Analysis,
    scored: Sequence[Scored],
    facts: Mapping[str, Any],
    throughput: Sequence[Throughput] = (),
    held: Sequence[Held] = (),
    resamples: int = stats.RESAMPLES,
) -> Document:
    """The report of a run; sections without content are left out."""
    measures = {r.of for r in analysis.results}
    model = run.line(facts.get("model"))
    line = (
        f"{model}, {len(measures)} task metrics, {analysis.samples} samples, "
        f"{len(analysis.cases)} cases, {analysis.answers} answers, {run.line(facts.get('date'))}"
    )
    how = HOW.format(confidence=100 * stats.CONFIDENCE, resamples=resamples, seed=stats.SEED)
    sections = (
        Section("Scores", (*_notices(analysis), Text(how), *_scores(analysis))),
        Section("Comparisons", tuple(_comparisons(analysis))),
        Section("Other metrics", tuple(_apart(analysis))),
        Section("Memory", tuple(_memory(analysis, scored, facts))),
        Section("Single tasks", tuple(_tasks(analysis, scored))),
        Section("Changed answers", tuple(_changes(analysis))),
        Section("Speed", tuple(figures.speed(analysis, throughput, held))),
        Section("How it was run", tuple(_run(facts))),
    )
    title = str(facts.get("title") or f"KV-cache compression: {model}")
    return Document(title, line, tuple(section for section in sections if section.blocks))


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found = []
    for block in blocks:
        if isinstance(block, Picture):
            found.append(block)
        elif isinstance(block, Fold):
            found += _pictures(block.blocks)
    return found


def _notices(analysis: Analysis) -> list[Block]:
    return [Notice(analysis.notes)] if analysis.notes else []


def _accuracies(analysis: Analysis) -> list[Group]:
    return [group for group in analysis.groups if group.metric == "score" and group.higher]


def _others(analysis: Analysis) -> list[Group]:
    return [group for group in analysis.groups if group not in _accuracies(analysis)]


def _scores(analysis: Analysis) -> list[Block]:
    groups = _accuracies(analysis)
    shown = [tables.headline(analysis, group) for group in groups]
    return [*shown[:1], *figures.overall(analysis), *shown[1:]]


def _comparisons(analysis: Analysis) -> list[Block]:
    found = [tables.comparison(analysis, g, analysis.macros) for g in _accuracies(analysis)]
    return [*found[:1], *(Fold(table.title, (table,)) for table in found[1:])]


def _apart(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    for group in _others(analysis):
        detail = tables.comparison(analysis, group, analysis.macros)
        blocks += [
            tables.headline(analysis, group),
            Fold(f"{group.name}: {group.metric} against the full cache and SnapKV", (detail,)),
        ]
    if blocks:
        text = "These are averaged only with themselves, never with the scores above."
        return [Text(text), *blocks]
    return []


def _memory(analysis: Analysis, scored: Sequence[Scored], facts: Mapping[str, Any]) -> list[Block]:
    cut = [found for found in analysis.cuts if found.cut]
    text = (
        f"{sum(c.cut for c in cut)} of {sum(c.turns for c in analysis.cuts)} prompts did not fit "
        f"the model and were cut, in {len(cut)} of {len(analysis.cuts)} tasks."
    )
    return [
        *figures.pareto(analysis, scored, facts),
        tables.kept(analysis),
        Text(text),
        Fold("Cut to fit the model, by task", (tables.cuts(analysis),)),
    ]


def _tasks(analysis: Analysis, scored: Sequence[Scored]) -> list[Block]:
    measures = dict.fromkeys(r.of for r in analysis.results)
    details = [tables.comparison(analysis, measure, analysis.results) for measure in measures]
    return [
        *figures.families(analysis),
        *figures.needles(scored),
        *(Fold(detail.title, (detail,)) for detail in details),
    ]


def _changes(analysis: Analysis) -> list[Block]:
    blocks: list[Block] = []
    if analysis.flips:
        blocks.append(tables.flips(analysis))
    for found in analysis.flips:
        lost, gained = len(found.lost), len(found.gained)
        if lost + gained:
            title = f"{case_name(found.case)}: {lost} lost, {gained} gained"
            blocks.append(Fold(title, (tables.flip_list(found, LISTED),)))
    if analysis.lengths:
        blocks.append(tables.lengths(analysis))
    return blocks


def _run(facts: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if facts.get("command"):
        blocks += [Text("The command that reproduces it:"), Code(str(facts["command"]))]
    else:
        blocks.append(Text("The command was not recorded."))
    blocks.append(tables.facts_table(facts))
    data = tables.data_table(facts)
    blocks.append(data if data.rows else Text("No data files were recorded."))
    settings = run.methods(facts)
    if not settings:
        blocks.append(Text("Settings of the methods were not recorded."))
    blocks += [Fold(f"Settings of {name}", (Code(text),)) for name, text in settings]
    return blocks
