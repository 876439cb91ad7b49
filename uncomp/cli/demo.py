"""`uncomp demo`: one long question to a real server, without and with compression."""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from uncomp.cli.server import Server, ServerError

NAME, NUMBER = "quiet-river", "7294163"
_NEEDLE = f"One of the special magic numbers for {NAME} is: {NUMBER}. "
_TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
_QUESTION = f"What is the special magic number for {NAME} mentioned in the provided text?"
_PREFIX = f"The special magic number for {NAME} mentioned in the provided text is"
_DEPTH = 0.4  # where in the text the needle lies
_TOKENS = 64  # generated per case
_WARM = 8  # tokens after which blocks are counted and speed is measured


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        blocks: KV blocks held while decoding.
        freed: KV blocks given back by compaction.
        speed: decoded tokens per second.
    """

    name: str
    answer: str
    prompt_tokens: int
    blocks: int
    freed: int
    speed: float

    @property
    def right(self) -> bool:
        return NUMBER in self.answer


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand; `run` becomes its action."""
    parser = subparsers.add_parser(
        "demo",
        help="compressed and uncompressed answers of a small real model, side by side",
        description="Fetches a small model (93 MB, once), serves it with compression and asks for "
        "a number hidden in a long text, without and with compression. Exit status 0: both answers "
        "are right and KV blocks were given back.",
    )
    parser.add_argument("--keep", type=float, default=0.25, help="keep ratio (default: 0.25)")
    parser.add_argument(
        "--tokens", type=int, default=3500, help="length of the text, about (default: 3500)"
    )
    parser.add_argument(
        "--log", type=Path, default=None, help="the server's log (default: a temporary file)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 if both answers are right and blocks were given back, else 1."""
    from uncomp.demo_model import DemoModelError, demo_model_path

    log = args.log or Path(tempfile.gettempdir(), f"uncomp-demo-{uuid.uuid4().hex[:8]}.log")
    try:
        model = demo_model_path()
        print(f"starting the server (log: {log})", file=sys.stderr)
        with Server(_arguments(model, args.keep), log) as server:
            text = _text(server, args.tokens)
            print("asking without compression, then with", file=sys.stderr)
            _ask(server, "warm-up", _text(server, 300), {})
            cases = [
                _ask(server, "full KV cache", text, {"kv_compress": False}),
                _ask(server, f"compressed, keep {args.keep:g}", text, {}),
            ]
    except (DemoModelError, ServerError) as error:
        print(f"uncomp demo: {error}", file=sys.stderr)
        return 1
    print(_table(cases))
    full, compressed = cases
    if full.right and compressed.right and compressed.freed > 0:
        print(
            f"Both answers are right; {compressed.freed} of {full.blocks} KV blocks were given "
            f"back to vLLM's pool."
        )
        return 0
    print("FAIL: see the table", file=sys.stderr)
    return 1


def _arguments(model: Path, keep: float) -> list[str]:
    return [
        str(model), "--served-model-name", "demo", "--kv-keep", str(keep),
        # Enough here, and quick to start.
        "--max-model-len", "8192", "--kv-cache-memory-bytes", "500000000", "--enforce-eager",
    ]  # fmt: skip


def _text(server: Server, tokens: int) -> str:
    """The start of a packaged book, about `tokens` long, with the needle in it."""
    book = (files("uncomp.data") / "moby_dick.txt").read_text(encoding="utf-8")[: 6 * tokens]
    count = server.post("/tokenize", {"model": "demo", "prompt": book})["count"]
    book = book[: len(book) * tokens // count]
    at = book.index(". ", int(_DEPTH * len(book))) + 2
    return book[:at] + _NEEDLE + book[at:]


def _ask(server: Server, name: str, text: str, settings: dict[str, Any]) -> Case:
    body = {
        "model": "demo",
        "messages": [
            {"role": "user", "content": f"{_TASK}{text}\n{_QUESTION}"},
            {"role": "assistant", "content": _PREFIX},
        ],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "temperature": 0,
        "max_tokens": _TOKENS,
        "ignore_eos": True,  # the same number of tokens in both cases
        "vllm_xargs": settings,
        "cache_salt": uuid.uuid4().hex,  # no help from the prefix cache for the second case
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    freed = server.metrics()["uncomp:blocks_freed_total"]
    usage: dict[str, int] = {}
    answer, blocks = "", 0.0
    arrivals: list[float] = []
    for event in server.stream("/v1/chat/completions", body):
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            answer += choice["delta"].get("content") or ""
        arrivals.append(time.perf_counter())
        if not blocks and usage.get("completion_tokens", 0) >= _WARM:
            blocks = server.metrics()["uncomp:kv_blocks_held"]
    return Case(
        name,
        answer.split("\n")[0].split(". ")[0].strip(),
        usage["prompt_tokens"],
        int(blocks),
        int(server.metrics()["uncomp:blocks_freed_total"] - freed),
        # The median: one hiccup of the machine does not matter.
        1 / statistics.median(b - a for a, b in itertools.pairwise(arrivals[_WARM + 1 : -1])),
    )


def _table(cases: list[Case]) -> str:
    rows = [("", "answer", "right", "prompt tokens", "KV blocks held", "given back", "tokens/s")]
    for case in cases:
        rows.append(
            (
                case.name,
                case.answer[:24],
                "yes" if case.right else "NO",
                str(case.prompt_tokens),
                str(case.blocks),
                str(case.freed),
                f"{case.speed:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
