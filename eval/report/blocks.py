"""What a report is made of, before it is a page: sections of text, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: first line. small: further lines (interval, n), in small print.
        mark: ``best``, or ``down`` / ``up`` for a change whose interval excludes zero.
    """

    text: str
    small: tuple[str, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers unless ``words``."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    words: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Something a reader must know before trusting a number."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A plot. name: stem of its file. svg: its content. caption: says what, n and intervals."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Fold:
    """Details that are opened on demand; left out of the Markdown page."""

    title: str
    blocks: tuple[Block, ...]


Block: TypeAlias = "Table | Text | Notice | Code | Picture | Fold"


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return "-".join(self.title.lower().split())


def table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Cell | str]],
    note: str = "",
    words: bool = False,
) -> Table:
    """A table whose cells may be plain text.

    Raises:
        ValueError: a row is not as long as the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"{title}: a row of {len(row)} cells below a head of {len(head)}")
    cells = tuple(tuple(c if isinstance(c, Cell) else Cell(c) for c in row) for row in rows)
    return Table(title, tuple(head), cells, note, words)
