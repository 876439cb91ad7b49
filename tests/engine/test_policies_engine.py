"""Every policy on the real engine: what it keeps and gives back, and that it is attended to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import BLOCK, Answer, Ask, Engine, running
from reference import Reference
from traffic import OFF, Source

from uncomp import policies
from uncomp.calibration.collect import calibrate, load_model
from uncomp.calibration.text import default_texts

KEEP, SINKS, WINDOW, HEADS, LAYERS = 0.25, 4, 8, 3, 30
SETTINGS = {"keep": KEEP, "min_tokens": 64, "recompact_every": 32, "window": WINDOW}
# The engine computes in float32 here, see test_equality.py.
TOLERANCE = 5e-4
PROTECTED = {"protected": ((10, 60), (310, 330))}


def _asks(model: Path, policy: str | None = None) -> list[Ask]:
    """Four requests, under a policy of their own if one is given."""
    source = Source(model)
    own = {"kv_policy": policy, "kv_report": True} if policy else {}
    spans = {"kv_protect": "10:60,-20:"}
    asks = [
        Ask("short", source.take(100), tokens=20, extra=own),
        Ask("protected", source.take(330), tokens=40, extra={**own, **spans}),
        Ask("long", source.take(590), tokens=40, extra=own),
        Ask("off", source.take(70), tokens=10, extra=OFF),
    ]
    return [dataclasses.replace(ask, name=_name(policy, ask.name)) for ask in asks]


def _name(policy: str | None, name: str) -> str:
    return f"{policy} {name}" if policy else name


@dataclass
class Outcome:
    """What one policy did: answers, trace records by name, and blocks held over time."""

    answers: dict[str, Answer]
    records: dict[str, list[dict[str, Any]]]
    held: list[tuple[float, int]]
    leftovers: dict[str, Any]

    def of(self, policy: str) -> Outcome:
        """The part of one policy, under the plain names."""
        names = {_name(policy, name): name for name in ("short", "protected", "long", "off")}
        answers = {short: self.answers[name] for name, short in names.items()}
        records = {short: self.records[name] for name, short in names.items()}
        return Outcome(answers, records, self.held, self.leftovers)


def _serve(model: Path, settings: dict[str, Any], asks: list[Ask]) -> Outcome:
    with running(
        model, settings, dtype="float32", max_model_len=1024, kv_cache_memory_bytes=700_000_000
    ) as engine:
        held: list[tuple[float, int]] = []
        groups = engine.serve(asks, observe=lambda: _observe(engine, held))
        answers = {name: answer for name, [answer] in groups.items()}
        records = {name: engine.trace(answer.request_id) for name, answer in answers.items()}
        return Outcome(answers, records, held, engine.leftovers())


def _observe(engine: Engine, held: list[tuple[float, int]]) -> None:
    """Append (blocks in theory, blocks held) of every compressed request that is running."""
    last = {record["request_id"]: record["num_tokens"] for record in engine.trace()}
    for request in engine.scheduler.running:
        if request.request_id in last:
            then = last[request.request_id]
            tokens = math.ceil(KEEP * then) + request.num_computed_tokens - then
            held.append((tokens / BLOCK, engine.manager.held_blocks(request.request_id)))


@pytest.fixture(scope="module")
def served(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All policies side by side on one engine: every request has its own."""
    settings = {**SETTINGS, "trace": str(tmp_path_factory.mktemp("trace"))}
    asks = [ask for policy in policies.NAMES for ask in _asks(demo_model, policy)]
    return _serve(demo_model, settings, asks)


@pytest.fixture(params=policies.NAMES)
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def outcome(policy: str, served: Outcome) -> Outcome:
    return served.of(policy)


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model, torch.float32)


def test_compressed_and_given_back(outcome: Outcome) -> None:
    """After the prefill and every 32 tokens; an opted-out request never; all blocks return."""
    generations = {name: len(records) for name, records in outcome.records.items()}
    assert generations == {"short": 1, "protected": 2, "long": 2, "off": 0}
    assert outcome.leftovers == {}


def test_blocks_held_are_within_one_of_theory(served: Outcome) -> None:
    """Theory: keep ratio times the tokens at the compaction, plus the tokens since."""
    assert len(served.held) > 400
    for theory, held in served.held:
        assert math.ceil(theory) <= held <= math.ceil(theory) + 1


def test_kept_sets_are_well_formed(outcome: Outcome) -> None:
    """Each head: whole blocks of distinct positions that it still had, first to last."""
    for records in outcome.records.values():
        before: list[list[set[int]]] | None = None
        before_tail = 0
        for record in records:
            tail = record["full_blocks"] * BLOCK
            assert record["num_tokens"] - BLOCK < tail <= record["num_tokens"]
            assert [len(layer) for layer in record["kept"]] == [HEADS] * LAYERS
            for i, layer in enumerate(record["kept"]):
                for h, kept in enumerate(layer):
                    assert len(kept) % BLOCK == 0
                    assert kept == sorted(set(kept))
                    assert kept[-1] < tail
                    if before is not None:
                        assert set(kept) <= before[i][h] | set(range(before_tail, tail))
            before = [[set(kept) for kept in layer] for layer in record["kept"]]
            before_tail = tail


def test_every_layer_fills_its_blocks(outcome: Outcome) -> None:
    """The heads of a layer share exactly blocks * heads sub-blocks, none is wasted."""
    for name, records in outcome.records.items():
        for record in records:
            blocks = _blocks_in_theory(record, PROTECTED.get(name, ()))
            for layer in record["kept"]:
                assert sum(map(len, layer)) == blocks * HEADS * BLOCK


def _blocks_in_theory(record: dict[str, Any], spans: tuple[tuple[int, int], ...]) -> int:
    tail = record["num_tokens"] - record["full_blocks"] * BLOCK
    wanted = math.ceil(KEEP * record["num_tokens"]) - tail
    always = SINKS + WINDOW + sum(end - start for start, end in spans)
    return max(1, math.ceil(wanted / BLOCK), math.ceil(always / BLOCK))


def test_sinks_window_and_protected_spans_stay(outcome: Outcome) -> None:
    """In every head of every layer, after every compaction."""
    for name, records in outcome.records.items():
        for record in records:
            tail = record["full_blocks"] * BLOCK
            always = {*range(SINKS), *range(record["num_tokens"] - WINDOW, tail)}
            for start, end in PROTECTED.get(name, ()):
                always |= set(range(start, min(end, tail)))
            assert all(always <= set(kept) for layer in record["kept"] for kept in layer)


def test_attended_to(outcome: Outcome, reference: Reference) -> None:
    """The answers are those of a model that sees the kept tokens and no other."""
    for name, answer in outcome.answers.items():
        expected = reference.logprobs(answer.prompt, answer.tokens, outcome.records[name])
        for row, step in zip(expected, answer.logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(float(row[token]), abs=TOLERANCE)


def test_keeps_what_it_says(outcome: Outcome, policy: str) -> None:
    """The mark of each policy on the kept sets."""
    for record in outcome.records["long"]:
        assert MARKS[policy](record)


def test_answers_say_what_was_kept(outcome: Outcome) -> None:
    """`kv_report`: exactly what the trace says."""
    for name in ("short", "protected", "long"):
        _check_report(outcome.answers[name], outcome.records[name])
    assert outcome.answers["off"].facts is None


def test_policy_of_the_server_and_settings_of_a_request(demo_model: Path, tmp_path: Path) -> None:
    own = {"kv_settings": {"window": 1, "sinks": 0, "recompact_every": 0}}
    asks = _asks(demo_model)
    asks.append(Ask("own settings", asks[2].prompt, tokens=40, extra=own))
    settings = {**SETTINGS, "policy": "adakv", "trace": str(tmp_path)}
    records = _serve(demo_model, settings, asks).records
    assert all(MARKS["adakv"](record) for record in records["long"])
    assert all(0 in kept for layer in records["long"][0]["kept"] for kept in layer)
    [record] = records["own settings"]
    assert not all(0 in kept for layer in record["kept"] for kept in layer)


def _check_report(answer: Answer, records: list[dict[str, Any]]) -> None:
    assert answer.facts is not None
    last = records[-1]
    tail = (last["num_tokens"] - last["full_blocks"] * BLOCK) * HEADS * LAYERS
    kept = sum(len(kept) for layer in last["kept"] for kept in layer) + tail
    full = last["num_tokens"] * HEADS * LAYERS
    assert answer.facts == {
        "compactions": len(records),
        "tokens": last["num_tokens"],
        "full_tokens": full,
        "kept_tokens": kept,
        "keep": pytest.approx(kept / full),
    }


def _unequal_positions(record: dict[str, Any]) -> bool:
    return not _same_in_all_heads(record) and _equal_shares(record)


def _equal_shares(record: dict[str, Any]) -> bool:
    return all(len({len(kept) for kept in layer}) == 1 for layer in record["kept"])


def _same_in_all_heads(record: dict[str, Any]) -> bool:
    return all(layer[0] == kept for layer in record["kept"] for kept in layer)


def _most_recent(record: dict[str, Any]) -> bool:
    tail = record["full_blocks"] * BLOCK
    return all(
        kept == [*range(SINKS), *range(tail - len(kept) + SINKS, tail)]
        for layer in record["kept"]
        for kept in layer
    )


#: by policy, what shows in a record that it was this one
MARKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "streaming": _most_recent,
    "random": _unequal_positions,
    "uniform": _unequal_positions,
    "key_norm": _unequal_positions,
    "key_difference": _unequal_positions,
    "prerope_key_difference": _unequal_positions,
    "hybrid": _unequal_positions,
    "entropy": lambda record: not _equal_shares(record),
    "adakv": lambda record: not _equal_shares(record),
}


def test_calibration_file_decides_budgets(demo_model: Path, tmp_path: Path) -> None:
    """Shares follow the ranking in the file, not that of the prompt: it is turned by layer."""
    model, tokenizer = load_model(str(demo_model), "cpu")
    made = calibrate(model, tokenizer, str(demo_model), default_texts(), samples=1, tokens=256)
    ranks = [[((h + layer) % HEADS + 1) / 10 for h in range(HEADS)] for layer in range(LAYERS)]
    entropy = {s: {m: dict(t) for m, t in of.items()} for s, of in made.entropy.items()}
    entropy["queries"]["raw"]["mean"] = ranks
    file = tmp_path / "turned.json"
    dataclasses.replace(made, entropy=entropy).save(file)
    settings = {
        **SETTINGS,
        "policy": "entropy",
        "trace": str(tmp_path / "trace"),
        "calibration": str(file),
        "source": "queries",
        "measure": "raw",
        "ratio": 3.0,
    }
    outcome = _serve(demo_model, settings, _asks(demo_model))
    assert outcome.leftovers == {}
    for record in outcome.records["long"]:
        for layer, kept in enumerate(record["kept"]):
            shares = [len(positions) for positions in kept]
            by_rank = [shares[h] for h in sorted(range(HEADS), key=lambda h: ranks[layer][h])]
            assert by_rank == sorted(by_rank)
            assert by_rank[-1] > by_rank[0]
