"""Settings of a single request."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncomp.config import UncompConfig
from uncomp.request import RequestError, RequestSettings, request_settings

CONFIG = UncompConfig(keep=0.25)
BUDGET = UncompConfig(budget=256)


def settings(config: UncompConfig = CONFIG, tokens: int = 1000, **given: Any) -> RequestSettings:
    return request_settings(given, config, tokens)


def test_defaults_are_the_servers() -> None:
    assert request_settings(None, CONFIG, 10) == RequestSettings(True, 0.25, None)
    assert request_settings({}, BUDGET, 10) == RequestSettings(True, None, 256)
    assert settings(temperature=1, kv=3) == RequestSettings(True, 0.25, None)


@pytest.mark.parametrize(
    ("config", "given_", "expected"),
    [
        (CONFIG, {"kv_keep": 0.5}, RequestSettings(True, 0.5, None)),
        (CONFIG, {"kv_keep": "0.5"}, RequestSettings(True, 0.5, None)),
        (CONFIG, {"kv_keep": 1}, RequestSettings(False, 1.0, None)),
        (CONFIG, {"kv_budget": 100}, RequestSettings(True, None, 100)),
        (CONFIG, {"kv_budget": "100"}, RequestSettings(True, None, 100)),
        (CONFIG, {"kv_budget": 100.0}, RequestSettings(True, None, 100)),
        (BUDGET, {"kv_keep": 0.5}, RequestSettings(True, 0.5, None)),
        (BUDGET, {"kv_budget": 36}, RequestSettings(True, None, 36)),
        (CONFIG, {"kv_compress": False}, RequestSettings(False, 0.25, None)),
        (UncompConfig(keep=1.0), {}, RequestSettings(False, 1.0, None)),
        (UncompConfig(keep=1.0), {"kv_keep": 0.5}, RequestSettings(True, 0.5, None)),
    ],
)
def test_own_settings_win(
    config: UncompConfig, given_: dict[str, Any], expected: RequestSettings
) -> None:
    assert settings(config, **given_) == expected


@pytest.mark.parametrize("value", [True, "true", "TRUE", " on ", 1, "1"])
def test_switch_on(value: Any) -> None:
    assert settings(kv_compress=value).compress


@pytest.mark.parametrize("value", [False, "false", "Off", 0, "0"])
def test_switch_off(value: Any) -> None:
    assert not settings(kv_compress=value).compress


@pytest.mark.parametrize(
    ("value", "place"),
    [(1, 1), ("700", 700), (999, 999), (-1, 999), (-999, 1), (250.0, 250), (1000, None)],
)
def test_place_of_the_compaction(value: Any, place: int | None) -> None:
    assert settings(kv_compact_at=value).compact_at == place


@pytest.mark.parametrize(
    ("value", "spans"),
    [
        ("0:200", ((0, 200),)),
        ("-64:", ((936, 1000),)),
        (":", ((0, 1000),)),
        ("0:0", ()),
        ("10:5", ()),
        ("990:2000", ((990, 1000),)),
        ("5000:6000", ()),
        (":-990", ((0, 10),)),
        ("-3:-1, 4:6", ((4, 6), (997, 999))),
        (["0:5", "3:9"], ((0, 9),)),
        (("0:5", "5:9"), ((0, 9),)),
        ("0:100,20:30,-5000:2", ((0, 100),)),
        ([], ()),
    ],
)
def test_protected_spans(value: Any, spans: tuple[tuple[int, int], ...]) -> None:
    assert settings(kv_protect=value).protect == spans


BOUND = st.one_of(st.none(), st.integers(-60, 60))


@given(st.lists(st.tuples(BOUND, BOUND), max_size=6), st.integers(0, 50))
def test_spans_cover_what_python_slices_cover(
    slices: list[tuple[int | None, int | None]], tokens: int
) -> None:
    text = [
        "".join(("" if a is None else str(a), ":", "" if b is None else str(b))) for a, b in slices
    ]
    found = settings(tokens=tokens, kv_protect=text)
    covered = {p for a, b in slices for p in range(tokens)[a:b]}
    assert {p for start, end in found.protect for p in range(start, end)} == covered
    assert found.protected_tokens == len(covered)
    edges = [edge for span in found.protect for edge in span]
    assert edges == sorted(set(edges)), "spans are not disjoint and apart"


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"kv_kep": 0.5}, r"unknown setting \['kv_kep'\]; allowed: \['kv_compress'"),
        ({"kv_keep": 0.5, "kv_budget": 100}, "kv_keep or kv_budget, not both"),
        ({"kv_keep": 0}, r"kv_keep=0: must be a number in \(0, 1\]"),
        ({"kv_keep": 1.01}, "kv_keep=1.01"),
        ({"kv_keep": -0.5}, "kv_keep=-0.5"),
        ({"kv_keep": float("nan")}, "kv_keep=nan"),
        ({"kv_keep": True}, "kv_keep=True"),
        ({"kv_keep": None}, "kv_keep=None"),
        ({"kv_keep": [0.5]}, r"kv_keep=\[0.5\]"),
        ({"kv_keep": "half"}, "kv_keep='half'"),
        ({"kv_budget": 35}, "kv_budget=35: must be a whole number of tokens, at least 36"),
        ({"kv_budget": 100.5}, "kv_budget=100.5"),
        ({"kv_budget": True}, "kv_budget=True"),
        ({"kv_budget": "many"}, "kv_budget='many'"),
        ({"kv_budget": float("inf")}, "kv_budget=inf"),
        ({"kv_budget": float("nan")}, "kv_budget=nan"),
        ({"kv_budget": None}, "kv_budget=None"),
        ({"kv_budget": {}}, "kv_budget={}"),
        ({"kv_compress": "maybe"}, "kv_compress='maybe': must be true or false"),
        ({"kv_compress": None}, "kv_compress=None"),
        ({"kv_compress": 2}, "kv_compress=2"),
        ({"kv_compact_at": 0}, "kv_compact_at=0: must be a whole number of the prompt's 1000"),
        ({"kv_compact_at": 1001}, "kv_compact_at=1001"),
        ({"kv_compact_at": -1000}, "kv_compact_at=-1000"),
        ({"kv_compact_at": 10.5}, "kv_compact_at=10.5"),
        ({"kv_compact_at": True}, "kv_compact_at=True"),
        ({"kv_compact_at": "end"}, "kv_compact_at='end'"),
        ({"kv_protect": "0-200"}, "kv_protect='0-200': must be slices of the prompt"),
        ({"kv_protect": "0:200:2"}, "kv_protect='0:200:2'"),
        ({"kv_protect": "0:2,,"}, "kv_protect='0:2,,'"),
        ({"kv_protect": ""}, "kv_protect=''"),
        ({"kv_protect": [1, 2]}, r"kv_protect=\[1, 2\]"),
        ({"kv_protect": None}, "kv_protect=None"),
        ({"kv_protect": "a:b"}, "kv_protect='a:b'"),
    ],
)
def test_bad_values_say_what_is_allowed(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings(**given_)


def test_overrides_can_be_forbidden() -> None:
    config = UncompConfig(keep=0.25, overrides="forbid")
    assert settings(config).compress
    with pytest.raises(RequestError, match=r"\['kv_compress'\]: this server does not allow"):
        settings(config, kv_compress=False)


def test_tighten_lets_a_request_keep_more_never_less() -> None:
    config = UncompConfig(keep=0.25, overrides="tighten")
    assert settings(config, kv_keep=0.25).keep == 0.25
    assert settings(config, kv_budget=250).budget == 250
    assert not settings(config, kv_compress=False).compress
    with pytest.raises(RequestError, match=r"keeps 0.200 .* more than the default of 0.250"):
        settings(config, kv_keep=0.2)
    with pytest.raises(RequestError, match=r"keeps 0.249"):
        settings(config, kv_budget=249)
    budget = UncompConfig(budget=256, overrides="tighten")
    assert settings(budget, kv_keep=0.256).keep == 0.256
    with pytest.raises(RequestError, match=r"default of 0.256"):
        settings(budget, kv_keep=0.25)
    # Shorter than the budget: the server keeps everything, so a request may not ask for less.
    with pytest.raises(RequestError, match=r"default of 1.000"):
        settings(budget, tokens=100, kv_keep=0.9)


def test_lowest_keep_ratio() -> None:
    config = UncompConfig(keep=0.5, min_keep=0.1)
    assert settings(config, kv_keep=0.1).keep == 0.1
    with pytest.raises(RequestError, match=r"keeps 0.099 .* this server allows 0.1 and more"):
        settings(config, kv_keep=0.099)
    with pytest.raises(RequestError, match=r"keeps 0.050"):
        settings(config, kv_budget=50)
    assert settings(config, tokens=0, kv_budget=50).budget == 50
    # The server's own default is not a request's fault.
    assert settings(UncompConfig(keep=0.05, min_keep=0.1), kv_protect=":5").keep == 0.05


PRUNING = UncompConfig(keep=1.0, prefill_keep=0.5, prefill_stages="2,5")


def test_pruning_is_the_servers_or_the_requests_own() -> None:
    assert settings(CONFIG).prefill_keep == 1.0
    assert settings(PRUNING).prefill_keep == 0.5
    assert settings(PRUNING, kv_prefill_keep="0.75").prefill_keep == 0.75
    assert settings(PRUNING, kv_prefill_keep=1).prefill_keep == 1.0
    assert settings(PRUNING, kv_compress=False).prefill_keep == 1.0  # off means off


def test_pruning_leaves_the_policy_the_servers() -> None:
    assert settings(PRUNING, kv_settings={}).own is None
    own = settings(PRUNING, kv_settings={"prefill_scores": "attention"}).own
    assert own is not None
    assert (own.prefill_scores, own.prefill_keep) == ("attention", None)


@pytest.mark.parametrize(
    ("config", "given_", "message"),
    [
        (CONFIG, {"kv_prefill_keep": 0.5}, "prunes no prompts; start it with --prefill-keep 1"),
        (PRUNING, {"kv_prefill_keep": 0}, r"kv_prefill_keep=0: must be a number in \(0, 1\]"),
        (PRUNING, {"kv_prefill_keep": "half"}, "kv_prefill_keep='half'"),
        (PRUNING, {"kv_compact_at": 500}, "add kv_prefill_keep=1"),
        (
            dataclasses.replace(PRUNING, overrides="tighten"),
            {"kv_prefill_keep": 0.4},
            "may only ask for more than the default of 0.5",
        ),
    ],
)
def test_pruning_that_is_not_allowed(
    config: UncompConfig, given_: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        settings(config, **given_)


def test_parts_of_a_prompt_or_pruning() -> None:
    both = settings(PRUNING, kv_compact_at=500, kv_prefill_keep=1, kv_keep=0.25)
    assert (both.compact_at, both.prefill_keep) == (500, 1.0)
