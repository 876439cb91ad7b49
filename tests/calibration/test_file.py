"""The calibration file: what is written is read back, what is damaged is refused with a reason."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uncomp.calibration.file import (
    STATISTICS,
    Calibration,
    CalibrationError,
    identity_hash,
    load,
    model_identity,
)
from uncomp.config import MEASURES, SOURCES

LAYERS, KV_HEADS = 3, 2


def hf_config(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS, "head_dim": 8, "hidden_size": 32, "vocab_size": 100,
        "rope_theta": 10000.0, "rope_scaling": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


ZEROS = [[0.0] * KV_HEADS for _ in range(LAYERS)]


def example() -> Calibration:
    identity = model_identity(hf_config())
    table = [[round(0.1 * (layer + head) + 0.05, 6) for head in range(KV_HEADS)]
             for layer in range(LAYERS)]  # fmt: skip
    return Calibration(
        model="tiny", identity=identity, config_hash=identity_hash(identity), num_layers=LAYERS,
        num_query_heads=4, num_kv_heads=KV_HEADS, head_dim=8, truncation=2, unit_norm=True,
        samples=2, tokens_per_sample=64, seed=0, text=[{"name": "a [ 1, 2 ].txt", "sha256": "0"}],
        versions={"torch": "2"}, created="2025-11-20T00:00:00+00:00",
        entropy={s: {m: {t: table for t in STATISTICS} for m in MEASURES} for s in SOURCES},
        importance={"keeps": [0.25, 0.5], "shares": [table, table], "samples": 2, "tokens": 64},
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    example().save(path)
    return path


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_round_trip(saved: Path) -> None:
    assert load(saved) == example()


def test_files_without_importance_are_read_and_say_so(saved: Path) -> None:
    edit(saved, lambda c: c.pop("importance"))
    calibration = load(saved)
    with pytest.raises(CalibrationError, match=r"no importance of heads.*calibrate again"):
        calibration.head_importance()


def test_importance_is_read_back(saved: Path) -> None:
    importance = load(saved).head_importance()
    assert importance.keeps == (0.25, 0.5)
    assert importance.shares.shape == (2, LAYERS, KV_HEADS)
    assert importance.shares[1].tolist() == example().importance["shares"][1]


def test_one_row_per_line_and_no_leftovers(saved: Path) -> None:
    assert re.search(r"^ +\[0\.05, 0\.15\],$", saved.read_text(), re.MULTILINE)
    assert [path.name for path in saved.parent.iterdir()] == ["tiny.json"]


def test_save_into_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot write"):
        example().save(tmp_path / "missing" / "file.json")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("measure", MEASURES)
def test_scores_shape(source: str, measure: str) -> None:
    scores = example().scores(source, measure)
    assert scores.shape == (LAYERS, KV_HEADS)
    assert scores.dtype == torch.float64


def test_scores_unknown_measure() -> None:
    with pytest.raises(CalibrationError, match="renyi"):
        example().scores("keys", "renyi")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read .*absent\.json"):
        load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ('{"model": ', "not JSON"),
        ("[1, 2]", "JSON list"),
        ("{}", "format version None"),
        ('{"format_version": 1}', "missing fields"),
    ],
    ids=["empty", "cut off", "list", "no version", "no fields"],
)
def test_corrupt(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        load(path)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot read"):
        load(path)


def mean_of(content: dict[str, Any]) -> list[Any]:
    return content["entropy"]["keys"]["full"]["mean"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "version 2, this uncomp reads 1"),
        (lambda c: c["importance"].pop("keeps"), "importance must be an object with.*'keeps'"),
        (lambda c: c["importance"].update(keeps=[0.5, 0.25]), "importance.keeps.*ascending"),
        (lambda c: c["importance"].update(keeps=[0.5, 1.0]), "importance.keeps.*ascending"),
        (lambda c: c["importance"]["shares"].pop(), "importance.shares must hold 2 tables"),
        (lambda c: c["importance"]["shares"][1].pop(), r"importance.shares\[1\] has rows"),
        (lambda c: c["importance"]["shares"][0][0].__setitem__(0, 1.5), "outside"),
        (lambda c: c["importance"]["shares"].__setitem__(0, ZEROS), "all zero"),
        (lambda c: c.pop("samples"), r"missing fields \['samples'\]"),
        (lambda c: c.update(extra=1), r"unknown fields \['extra'\]"),
        (lambda c: mean_of(c)[1].__setitem__(0, float("nan")), "contains NaN"),
        (lambda c: mean_of(c)[1].__setitem__(0, float("inf")), "contains Infinity"),
        (lambda c: mean_of(c)[1].__setitem__(0, "0.5"), r"mean\[1\]\[0\] is '0.5'"),
        (lambda c: mean_of(c)[1].__setitem__(0, True), r"mean\[1\]\[0\] is True"),
        (lambda c: mean_of(c)[1].__setitem__(0, 1.5), r"outside \[0, 1\]"),
        (lambda c: mean_of(c)[1].__setitem__(0, -0.5), r"outside \[0, 1\]"),
        (lambda c: mean_of(c)[1].pop(), r"keys\.full\.mean has rows of lengths \[2, 1, 2\]"),
        (lambda c: mean_of(c).pop(), "expected 3 layers of 2 KV heads"),
        (lambda c: mean_of(c).append(7), "expected 3 layers of 2 KV heads"),
        (lambda c: c["entropy"]["keys"]["full"].update(mean=5), "expected 3 layers"),
        (lambda c: c["entropy"].pop("queries"), r"entropy\.queries\.raw\.mean is missing"),
        (lambda c: c.update(num_layers=4), "field num_layers is 4, the identity says 3"),
        (lambda c: c.update(samples=0), "samples is 0, expected a positive integer"),
        (lambda c: c.update(unit_norm=1), "unit_norm is 1, expected bool"),
        (lambda c: c.update(truncation=9), "truncation 9 exceeds head_dim 8"),
        (lambda c: c["identity"].update(vocab_size=7), "config_hash does not belong"),
    ],
    ids=[
        "version", "importance: no ratios", "importance: order", "importance: all",
        "importance: few tables", "importance: few layers", "importance: range",
        "importance: zero", "missing field", "unknown field", "nan", "infinity", "string", "bool",
        "above range", "below range", "short row", "few layers", "row is a number",
        "table is a number", "no queries", "layer count", "no samples", "unit norm", "truncation",
        "edited identity",
    ],
)  # fmt: skip
def test_damaged(saved: Path, change: Any, message: str) -> None:
    edit(saved, change)
    with pytest.raises(CalibrationError, match=message):
        load(saved)


def test_huge_number_is_infinite(saved: Path) -> None:
    saved.write_text(saved.read_text().replace("0.05,", "1e999,", 1))
    with pytest.raises(CalibrationError, match="finite"):
        load(saved)


def test_check_model_accepts_its_model() -> None:
    example().check_model(hf_config())
    # A config of transformers 5 says the same in other words.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    example().check_model(hf_config(rope_theta=None, rope_parameters=rope))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 4}, ["'num_layers': 3", "'num_layers': 4"]),
        ({"num_key_value_heads": 4}, ["'num_kv_heads': 2", "'num_kv_heads': 4"]),
        ({"rope_theta": 5e5}, ["10000.0", "500000.0"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'default'", "'linear'"]),
    ],
    ids=["layers", "kv heads", "theta", "rope scaling"],
)
def test_check_model_names_both(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CalibrationError) as error:
        example().check_model(hf_config(**changes))
    assert all(word in str(error.value) for word in [*words, "uncomp calibrate"])


def test_query_heads_must_be_a_multiple() -> None:
    with pytest.raises(CalibrationError, match="not a multiple"):
        dataclasses.replace(example(), num_query_heads=5)
