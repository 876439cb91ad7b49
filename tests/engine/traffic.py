"""Requests made of real text, and the scenarios in which they are served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from harness import Ask

OFF = {"kv_compress": False}


class Source:
    """Token ids of real text: every request takes another piece of it."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = sorted(p.name for p in files("uncomp.data").iterdir() if p.name.endswith(".txt"))
        self._ids: list[int] = []
        for name in texts:
            text = (files("uncomp.data") / name).read_text(encoding="utf-8")[:120_000]
            self._ids += tokenizer(text, verbose=False)["input_ids"]
        self._at = 0

    def take(self, tokens: int) -> tuple[int, ...]:
        """The next `tokens` ids; starts over when the text ends."""
        if self._at + tokens > len(self._ids):
            self._at = 0
        self._at += tokens
        return tuple(self._ids[self._at - tokens : self._at])


@dataclass(frozen=True)
class Scenario:
    """Requests and how they are served.

    Attributes:
        asks: in the order of arrival.
        at_once: how many are in the engine together; `None` = all.
        pool: blocks to serve from; `None` = all.
    """

    name: str
    asks: tuple[Ask, ...]
    at_once: int | None = None
    pool: int | None = None

    def spared(self) -> Scenario:
        """The same with a budget larger than any prompt."""
        asks = tuple(replace(a, extra={"kv_budget": 100_000}) for a in self.asks)
        return replace(self, asks=asks)


def batch(source: Source) -> Scenario:
    """32 sequences at once: all lengths, shared prefixes, twins, samples, settings of their own."""
    prefix = source.take(320)
    twin = source.take(140)
    asks = [
        # The second reads blocks of the first that are compacted in the same step.
        Ask("twin short", twin[:100]),
        Ask("twin long", twin),
        Ask("long run", source.take(400), tokens=100),
        Ask("long run from nothing", source.take(2), tokens=100),
        Ask("long run, own budget", source.take(500), tokens=100, extra={"kv_budget": 64}),
        *(Ask(f"{n} tokens", source.take(n)) for n in (1, 3, 8, 9, 31, 32, 33, 63, 64, 65, 96)),
        *(Ask(f"{n} tokens", source.take(n)) for n in (127, 129, 256, 511, 1500)),
        *(Ask(f"off, {n} tokens", source.take(n), extra=OFF) for n in (5, 150, 450)),
        Ask("samples", source.take(200), samples=2, tokens=40),
        Ask("first of prefix", prefix + source.take(10)),
        Ask("second of prefix", prefix + source.take(70), tokens=40),
        Ask("off, of prefix", prefix + source.take(20), extra=OFF),
        Ask("protected", source.take(300), extra={"kv_protect": "10:60,-20:"}, tokens=40),
        Ask("again", source.take(600)),
    ]
    asks.append(replace(asks[-1], name="the same again"))
    return Scenario("batch", tuple(asks))


def single(source: Source) -> Scenario:
    """One at a time, each after the last has gone; later ones find prefixes in the cache."""
    prefix = source.take(288)
    first = Ask("first", prefix + source.take(40), tokens=48)
    asks = [
        first,
        replace(first, name="the same"),
        Ask("same prefix", prefix + source.take(200)),
        Ask("same prefix, off", prefix + source.take(3), extra=OFF),
        Ask("prefix alone", prefix),
        Ask("tiny", source.take(1)),
        Ask("long", source.take(900), tokens=20),
    ]
    return Scenario("single", tuple(asks), at_once=1)


def middle(source: Source) -> Scenario:
    """Compacted before the end of their prompts, beside others. (Greedy: steps are cut otherwise
    than in an unmodified engine, so samples would be drawn in another order.)"""
    prefix = source.take(320)
    whole = prefix + source.take(60)
    asks = [
        Ask("read whole", whole, extra=OFF),
        Ask("the same, in the middle", whole, extra={"kv_compact_at": -60}),
        Ask("in the middle of a block", source.take(420), tokens=40, extra={"kv_compact_at": 333}),
        Ask("at the end", prefix + source.take(30), tokens=40),
        Ask("again while reading", source.take(300), extra={"kv_compact_at": 150}),
        Ask("long", source.take(700)),
        Ask("too early", source.take(200), extra={"kv_compact_at": 10}),
    ]
    asks.append(replace(asks[1], name="the same again"))
    return Scenario("middle", tuple(asks), at_once=5)


def crowded(source: Source) -> Scenario:
    """More than the pool can hold: requests are preempted and resumed."""
    asks = []
    for i in range(8):
        asks.append(Ask(f"off {i}", source.take(60 + 8 * i), tokens=60, extra=OFF))
        asks.append(Ask(f"on {i}", source.take(200 + 20 * i), tokens=64, extra={"kv_keep": 0.4}))
    return Scenario("crowded", tuple(asks), pool=36)


def aborts(source: Source) -> Scenario:
    """Some give up: before their first token, and before and after a compaction."""
    asks = []
    for i, at in enumerate([None, 0, 1, None, 2, 40, None, 17, None, 33, 0, None]):
        ask = Ask(f"{i} {at}", source.take(40 + 50 * i), tokens=60 if at else 24, abort_at=at)
        asks.append(ask)
    return Scenario("aborts", tuple(asks))


def scenarios(model: Path) -> Sequence[Scenario]:
    source = Source(model)
    return batch(source), single(source), crowded(source), aborts(source), middle(source)
