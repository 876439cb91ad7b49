"""The settings object: what is allowed, what is not, presets, round trips."""

import dataclasses
import json
from typing import Any

import pytest

from uncomp import policies
from uncomp.config import (
    FLOORS,
    MEASURES,
    OVERRIDES,
    PREFILL_SCORES,
    PRESETS,
    SHARES,
    SOURCES,
    UncompConfig,
)
from uncomp.pruning import CHOICES


def test_defaults() -> None:
    config = UncompConfig(keep=0.25)
    assert (config.policy, config.policy_name, config.uses_entropy) == ("adakv", "adakv", False)
    assert (config.window, config.window_reduce, config.sinks) == (32, "max", 4)
    assert (config.pooling, config.pooling_kind) == (4, "word")
    assert config.to_dict() == {"keep": 0.25}


def test_every_way_to_share_has_a_floor_of_its_own() -> None:
    assert UncompConfig(keep=0.5).least_share == 0.2
    assert UncompConfig(keep=0.5, shares="calibrated", calibration="file").least_share == 0.5
    early = UncompConfig(keep=0.5, shares="calibrated", calibration="file", policy="hybrid")
    assert early.least_share == 0.2
    assert UncompConfig(keep=0.5, policy="hybrid", shares="pyramid").least_share == 0
    assert UncompConfig(keep=0.5, shares="pyramid").least_share == 0
    assert UncompConfig(keep=0.5, shares="pyramid", floor=0.3).least_share == 0.3
    assert set(FLOORS) == set(SHARES)


def test_scores_of_pruning_are_those_there_are() -> None:
    assert set(PREFILL_SCORES) == set(CHOICES)


def test_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        UncompConfig(keep=0.25).keep = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"exactly one of keep .* and budget .*got keep=None, budget=None"),
        ({"keep": 0.5, "budget": 100}, "got keep=0.5, budget=100"),
        ({"keep": 0.0}, r"keep=0.0: must be in \(0, 1\]"),
        ({"keep": -1.0}, r"keep=-1.0"),
        ({"keep": 1.5}, r"keep=1.5"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"keep": "0.5"}, r"keep='0.5': must be of type float \| None"),
        ({"keep": True}, "keep=True: must be of type"),
        ({"budget": 35}, r"budget=35: must be at least 36 \(recent tokens \+ sinks"),
        ({"budget": 11, "recent": 8}, "budget=11: must be at least 12"),
        ({"keep": 0.5, "recent": 0}, "recent=0: must be at least 1"),
        ({"budget": 100.0}, r"budget=100.0: must be of type int \| None"),
        ({"budget": True}, "budget=True"),
        ({"keep": 1.0, "prefill_keep": 0.5}, "needs to know the stages .*uncomp calibrate"),
        ({"keep": 1.0, "prefill_keep": 0.0, "prefill_stages": "2"}, r"prefill_keep=0.0: must be"),
        ({"keep": 1.0, "prefill_keep": 0.5, "prefill_stages": "2-5"}, "'2-5': must be the first"),
        ({"keep": 1.0, "prefill_scores": "best"}, "prefill_scores='best': must be one of"),
        ({"keep": 1.0, "prefill_floor": -1}, "prefill_floor=-1: must be at least 0"),
        ({"keep": 0.5, "window": 0}, "window=0: must be between 1 and 256"),
        ({"keep": 0.5, "window": 257}, "window=257"),
        ({"keep": 0.5, "window": None}, "window=None: must be of type int"),
        ({"keep": 0.5, "sinks": -1}, "sinks=-1: must be at least 0"),
        ({"keep": 0.5, "pooling": 0}, "pooling=0: must be between 1 and 1024"),
        ({"keep": 0.5, "pooling": 4, "pooling_kind": "max"}, "pooling=4: must be odd"),
        ({"keep": 0.5, "pooling_kind": "mean"}, r"pooling_kind='mean': must be one of"),
        ({"keep": 0.5, "window_reduce": "mean"}, r"window_reduce='mean': must be one of"),
        ({"keep": 0.5, "shares": "all"}, r"shares='all': must be one of"),
        ({"keep": 0.5, "shares": "calibrated"}, "needs a calibration file: run `uncomp calibrate"),
        ({"keep": 0.5, "groups": 0}, "groups=0"),
        ({"keep": 0.5, "ratio": 0.5}, "ratio=0.5: must be at least 1 .use reverse to flip"),
        ({"keep": 0.5, "ratio": float("nan")}, "ratio=nan"),
        ({"keep": 0.5, "floor": 1.01}, r"floor=1.01: must be in \[0, 1\]"),
        ({"keep": 0.5, "floor": float("nan")}, "floor=nan"),
        ({"keep": 0.5, "attention_share": 1}, r"attention_share=1.0: must be in \(0, 1\)"),
        ({"keep": 0.5, "reverse": 1}, "reverse=1: must be of type bool"),
        ({"keep": 0.5, "truncation": 0}, "truncation=0"),
        ({"keep": 0.5, "online_tokens": 63}, "online_tokens=63: must be at least 64"),
        ({"keep": 0.5, "min_tokens": 0}, "min_tokens=0"),
        ({"keep": 0.5, "recompact_every": -1}, "recompact_every=-1"),
        ({"keep": 0.5, "min_keep": 1.1}, r"min_keep=1.1: must be in \[0, 1\]"),
        ({"keep": 0.5, "reduce": "mean"}, r"reduce='mean': must be one of \['sum', 'max'\]"),
        ({"keep": 0.5, "measure": "half"}, "measure='half'"),
        ({"keep": 0.5, "source": "values"}, "source='values'"),
        ({"keep": 0.5, "overrides": "maybe"}, "overrides='maybe'"),
        ({"keep": 0.5, "policy": "entropi"}, "policy='entropi': must be one of .*uncomp-v1"),
        ({"keep": 0.5, "policy": None}, "policy=None"),
        ({"keep": 0.5, "early_policy": "later"}, "early_policy='later': must be one of"),
        (
            {"keep": 0.5, "policy": "entropy", "source": "queries"},
            "needs a calibration file: run `uncomp calibrate",
        ),
        ({"keep": 0.5, "policy": "uncomp-v1"}, "needs a calibration file"),
        ({"keep": 0.5, "policy": ["entropy"]}, r"policy=\['entropy'\]: must be of type str"),
    ],
)
def test_bad_settings_say_what_is_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UncompConfig.from_mapping(given)


@pytest.mark.parametrize("keep", [1, 1.0, 1e-6])
def test_whole_numbers_are_fine_where_a_float_is_wanted(keep: float) -> None:
    config = UncompConfig(keep=keep, ratio=3)
    assert (type(config.keep), type(config.ratio)) == (float, float)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("measure", MEASURES),
        ("source", SOURCES),
        ("overrides", OVERRIDES),
        ("policy", policies.NAMES),
    ],
)
def test_every_choice_is_accepted(name: str, values: tuple[str, ...]) -> None:
    for value in values:
        config = UncompConfig(keep=0.5, calibration="file.json", **{name: value})
        assert getattr(config, name) == value


def test_queries_need_calibration_only_where_entropies_are_used() -> None:
    assert not UncompConfig(keep=0.5, policy="uniform", source="queries").uses_entropy


@pytest.mark.parametrize("name", PRESETS)
def test_presets_supply_defaults(name: str) -> None:
    config = UncompConfig.from_mapping({"policy": name, "calibration": "file.json"})
    for field, value in PRESETS[name].items():
        assert getattr(config, field) == value
    assert (config.policy, config.policy_name, config.uses_entropy) == (name, "entropy", True)


def test_a_field_given_wins_over_a_preset_even_if_it_is_the_default() -> None:
    given = {"keep": 0.5, "policy": "uncomp-v2", "source": "keys", "pooling": 15, "groups": 4}
    config = UncompConfig.from_mapping(given)
    assert (config.source, config.pooling, config.groups) == ("keys", 15, 4)
    assert (config.ratio, config.measure) == (640 / 122, "raw")


def test_a_keep_ratio_replaces_the_budget_of_a_preset() -> None:
    given = {"keep": 0.5, "policy": "uncomp-v1", "calibration": "file.json"}
    config = UncompConfig.from_mapping(given)
    assert (config.keep, config.budget, config.sinks) == (0.5, None, 0)


def test_from_mapping_names_unknown_settings() -> None:
    with pytest.raises(ValueError, match=r"unknown uncomp setting \['keeep', 'zzz'\]; allowed: "):
        UncompConfig.from_mapping({"keep": 0.5, "zzz": 1, "keeep": 1})


@pytest.mark.parametrize("given", [None, 0.25, "keep", ["keep"], True])
def test_from_mapping_wants_an_object(given: Any) -> None:
    with pytest.raises(ValueError, match="must be an object like"):
        UncompConfig.from_mapping(given)


EXAMPLES: list[dict[str, Any]] = [
    {"keep": 0.25},
    {"keep": 1},
    {"budget": 512, "policy": "random", "seed": 7},
    {"policy": "uncomp-v1", "calibration": "file.json"},
    {"keep": 0.25, "policy": "uncomp-v1", "calibration": "file.json"},
    {"budget": 400, "policy": "uncomp-v2", "calibration": "file.json", "groups": 4},
    {"keep": 0.5, "policy": "uncomp-v2", "source": "keys", "ratio": 2.0, "pooling": 15},
    {"keep": 0.5, "relocate": True, "trace": "folder", "overrides": "tighten", "min_keep": 0.1},
]


@pytest.mark.parametrize("given", EXAMPLES, ids=lambda e: "-".join(map(str, e)))
def test_round_trip_through_json(given: dict[str, Any]) -> None:
    config = UncompConfig.from_mapping(given)
    assert config.to_dict() == given
    assert UncompConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_has_help() -> None:
    for field in dataclasses.fields(UncompConfig):
        assert field.metadata["help"].strip(), field.name
