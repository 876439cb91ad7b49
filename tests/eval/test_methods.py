"""Methods as requests and as configurations."""

from __future__ import annotations

import json

import pytest

from uncomp.config import UncompConfig
from uncomp.eval.methods import METHODS, Method, cases, find, server_settings
from uncomp.eval.run.records import Case
from uncomp.request import request_settings

SERVER = UncompConfig.from_mapping(server_settings(list(METHODS.values()), "calibration.json"))


OURS = {name: method for name, method in METHODS.items() if method.library == "vllm"}


@pytest.mark.parametrize("method", OURS.values(), ids=OURS)
def test_one_server_serves_them_all(method: Method) -> None:
    """A request under a method is served as by an engine with the method's own configuration."""
    asked = request_settings(json.loads(json.dumps(method.request(0.25))), SERVER, 4096)
    assert asked.compress == (not method.full)
    if method.full:
        return
    own = asked.own or SERVER
    file = {"calibration": "calibration.json"} if method.calibrated else {}
    expected = method.config(0.25, **file)
    for name in (
        "policy", "window", "window_reduce", "sinks", "pooling", "pooling_kind", "measure",
        "source", "groups", "ratio",
    ):  # fmt: skip
        assert getattr(own, name) == getattr(expected, name), name
    assert own.reverse == expected.reverse
    assert own.calibration == expected.calibration
    assert asked.keep == 0.25
    assert asked.report


def test_requests_fit_the_api() -> None:
    """``vllm_xargs`` takes strings and numbers, no objects and no truth values."""
    for method in METHODS.values():
        assert all(type(v) in (str, int, float) for v in method.request(0.5).values())


def test_everything_is_compared_with_the_full_cache() -> None:
    assert [m.name for m in find(["adakv", "full"])] == ["full", "adakv"]
    assert cases(find(["adakv"]), (0.5, 0.25)) == [
        Case("full", 1.0),
        Case("adakv", 0.5),
        Case("adakv", 0.25),
    ]


def test_the_default_before_the_question_is_that_of_the_server() -> None:
    [_, aware] = find(["uncomp"])
    [_, early] = find(["uncomp"], query_agnostic=True)
    assert aware.settings["policy"] == UncompConfig(keep=0.25).policy
    own = request_settings({"kv_compact_at": 500}, UncompConfig(keep=0.25), 1000).own
    assert own is not None
    assert early.settings["policy"] == own.policy != aware.settings["policy"]


def test_own_methods() -> None:
    found = find(["wide"], {"wide": {"policy": "entropy", "window": 48}})
    assert json.loads(found[1].request(0.5)["kv_settings"])["window"] == 48
    assert server_settings(found)["window"] == 48


def test_presses_of_kvpress() -> None:
    press = {"class": "AdaKVPress", "press": {"class": "SnapKVPress", "window_size": 32}}
    found = find(["kvpress-full", "kvpress-tova", "mine"], {"mine": {"kvpress": press}})
    assert [m.library for m in found] == ["vllm", "kvpress", "kvpress", "kvpress"]
    assert json.loads(found[3].request(0.5)["kvpress"]) == press
    assert [c.keep for c in cases(found, (0.5,))] == [1.0, 1.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="takes no other settings"):
        find(["mine"], {"mine": {"kvpress": press, "window": 8}})


def test_methods_that_prune() -> None:
    early = {"policy": "adakv", "prefill_keep": 0.25, "prefill_stages": "8"}
    found = find(["prune-0.5", "early"], {"early": early})
    assert server_settings(found, "file") == {
        "keep": 1.0,
        "policy": "entropy",
        "window": 32,
        "prefill_keep": 1.0,
        "prefill_stages": "8",
        "calibration": "file",
    }
    server = UncompConfig.from_mapping(server_settings(found, "file"))
    asked = [request_settings(m.request(0.5), server, 5000) for m in found]
    assert [a.prefill_keep for a in asked] == [1.0, 0.5, 0.25]
    published = request_settings(METHODS["prune-0.375-attention"].request(1.0), server, 5000)
    assert published.own is not None
    assert published.own.prefill_scores == "attention"
    other = {"policy": "adakv", "prefill_keep": 0.5, "prefill_stages": "9"}
    with pytest.raises(ValueError, match="one engine has one set of prefill_stages"):
        server_settings(find(["early", "other"], {"early": early, "other": other}))


def test_layers_share_where_a_method_asks() -> None:
    assert "shares" not in server_settings(find(["uncomp", "entropy"]))
    assert server_settings(find(["uncomp", "pyramidkv"]))["shares"] == "pyramid"
    both = server_settings(find(["pyramidkv", "hybrid-calibrated"]), "file")
    assert both["shares"] == "calibrated"
    server = UncompConfig.from_mapping(both)
    for name, shares in (("pyramidkv", "pyramid"), ("calibrated", "calibrated"), ("uncomp", None)):
        own = request_settings(METHODS[name].request(0.25), server, 5000).own
        assert own is not None
        assert own.shares == (shares or "policy")


@pytest.mark.parametrize(
    ("names", "extra", "says"),
    [
        (["best"], {}, "unknown method 'best'; there are: full, "),
        (["adakv"], {"adakv": {}}, "is built in"),
        (["mine"], {"mine": {"pooling": 8, "pooling_kind": "max"}}, "must be odd"),
        (["mine"], {"mine": {"pool": 7}}, "unknown uncomp setting"),
    ],
)
def test_refused(names: list[str], extra: dict[str, dict[str, int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find(names, extra)
