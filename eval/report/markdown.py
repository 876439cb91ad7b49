"""A report as Markdown with its plots beside it; what the HTML page folds away is left out."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import quote

from uncomp.eval.report.blocks import Block, Cell, Code, Fold, Notice, Picture, Table, Text
from uncomp.eval.report.contents import Document

MARKS = {"best": "★", "up": "▲", "down": "▼", "": ""}


def markdown(document: Document, plots: str = "plots", page: str = "report.html") -> str:
    """The page.

    Args:
        document: what to say.
        plots: folder of the plots, as seen from the page. page: name of the HTML page.
    """
    parts = [
        f"# {escaped(document.title)}",
        escaped(document.line),
        f"Single tasks, lists of changed answers and settings are in [{page}]({quote(page)}). "
        "★ is the best compressed method at a keep ratio, ▲ and ▼ mark differences whose "
        "interval excludes zero (better, worse).",
    ]
    for section in document.sections:
        shown = [part for block in section.blocks if (part := _block(block, plots))]
        if shown:
            parts += [f"## {escaped(section.title)}", *shown]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that shows as it is: no markup, no HTML, no cell border, one line."""
    safe = re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", text)
    return " ".join(safe.split())


def _block(block: Block, plots: str) -> str:
    match block:
        case Text():
            return escaped(block.text)
        case Notice():
            return "\n".join(f"> - {escaped(item)}" for item in block.items)
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}\n{block.text}\n{fence}"
        case Picture():
            path = quote(str(PurePosixPath(plots) / f"{block.name}.svg"))
            title = escaped(block.title)
            return f"**{title}**\n\n![{title}]({path})\n\n{escaped(block.caption)}"
        case Table():
            return _table(block)
        case Fold():
            return ""


def _table(table: Table) -> str:
    other = "---" if table.words else "---:"
    lines = [
        "| " + " | ".join(escaped(name) for name in table.head) + " |",
        "|" + "|".join(["---"] + [other] * (len(table.head) - 1)) + "|",
        *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows),
    ]
    parts = [f"**{escaped(table.title)}**", "\n".join(lines)]
    if table.note:
        parts.append(escaped(table.note))
    return "\n\n".join(parts)


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    if cell.mark:
        text = f"**{text}** {MARKS[cell.mark]}"
    return "<br>".join([text, *(escaped(line) for line in cell.small)])
