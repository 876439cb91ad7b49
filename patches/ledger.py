"""The ledger as a table: ``python -m uncomp.patches.ledger`` writes it to ``patches/README.md``."""

from __future__ import annotations

from pathlib import Path

from uncomp.patches.apply import PATCHES

README = Path(__file__).resolve().parent / "README.md"

_HEAD = """\
# What uncomp changes in vLLM

Everything, and nothing else: each line below wraps one function of vLLM and calls the original.
The rest of uncomp goes through vLLM's own extension points. A patch whose function is gone or has
another signature stops the engine with a message that names it; `UNCOMP_DISABLE=1` switches all of
them off. Tests take this table from the code: after a change run `python -m uncomp.patches.ledger`.

"""


def table() -> str:
    """The contents of ``patches/README.md``."""
    lines = [
        "| patch | wraps | why | upstream | can go when |",
        "|---|---|---|---|---|",
        *(
            f"| `{p.name}` | `{p.target}` | {_cell(p.why)} | {_cell(p.upstream)} "
            f"| {_cell(p.remove_when)} |"
            for p in PATCHES
        ),
    ]
    return _HEAD + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    README.write_text(table(), encoding="utf-8")
