"""A request's own policy."""

from typing import Any

import pytest

from uncomp.config import UncompConfig
from uncomp.request import RequestError, request_settings
from uncomp.request_policy import SETTABLE, own_config

SERVER = UncompConfig(keep=0.25, policy="entropy", window=16, pooling=9)


def own(server: UncompConfig = SERVER, **given: Any) -> UncompConfig | None:
    return request_settings(given, server, 1000).own


def test_nothing_given_is_the_servers() -> None:
    assert own() is None
    assert own(kv_keep=0.5) is None
    assert own(kv_policy="entropy") is None
    assert own(kv_settings={}) is None


def test_policy_keeps_the_servers_other_settings() -> None:
    assert own(kv_policy="adakv") == UncompConfig(keep=0.25, window=16, pooling=9, policy="adakv")


@pytest.mark.parametrize("settings", [{"pooling": 7, "window": 8}, '{"pooling": 7, "window": 8}'])
def test_settings_as_object_or_text(settings: Any) -> None:
    assert own(kv_settings=settings) == UncompConfig(
        keep=0.25, policy="entropy", window=8, pooling=7
    )


def test_preset_fills_in_and_leaves_the_budget_to_the_request(tmp_path: Any) -> None:
    server = UncompConfig(keep=0.25, policy="entropy", calibration=str(tmp_path / "any.json"))
    found = own(server, kv_policy="uncomp-v1", kv_keep=0.5)
    assert found is not None
    assert (found.groups, found.measure, found.source, found.sinks) == (2, "raw", "queries", 0)
    assert found.keep == 0.25  # the ratio of a request is beside its policy
    assert own(server, kv_policy="uncomp-v1", kv_settings={"pooling": 15}).pooling == 15  # type: ignore[union-attr]


def test_calibrated_server_can_be_asked_for_entropies_of_the_prompt(tmp_path: Any) -> None:
    server = UncompConfig(keep=0.25, policy="entropy", calibration=str(tmp_path / "any.json"))
    found = own(server, kv_settings={"calibration": None})
    assert found is not None
    assert found.calibration is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kv_policy": "best"}, "'best': must be one of"),
        ({"kv_policy": 3}, "must be a name"),
        ({"kv_policy": "uncomp-v1"}, "needs a calibration file"),
        ({"kv_settings": "pooling=7"}, "is not JSON"),
        ({"kv_settings": "[7]"}, "must be an object"),
        ({"kv_settings": {"pooling": 8, "pooling_kind": "max"}}, "must be odd"),
        ({"kv_settings": {"window": 17}}, "--kv-window 17"),
        ({"kv_settings": {"trace": "/tmp"}}, "unknown setting ['trace']; allowed: ['window'"),
        ({"kv_settings": {"calibration": "/etc/passwd"}}, "can only be null"),
        ({"kv_settings": {"overrides": "allow"}}, "unknown setting"),
    ],
)
def test_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        own(**given)
    assert says in str(error.value)


def test_layers_share_for_a_request_only_where_the_server_has_read_the_file(tmp_path: Any) -> None:
    file = {"keep": 0.25, "calibration": str(tmp_path / "any.json")}
    sharing = UncompConfig(**file, shares="calibrated")
    with pytest.raises(RequestError, match="one started with --kv-shares calibrated"):
        own(UncompConfig(**file), kv_settings={"shares": "calibrated"})
    with pytest.raises(RequestError, match="shares='pyramid'"):
        own(UncompConfig(**file), kv_settings={"shares": "pyramid"})
    with pytest.raises(RequestError, match="shares='calibrated'"):
        own(UncompConfig(**file, shares="pyramid"), kv_settings={"shares": "calibrated"})
    as_published = own(UncompConfig(**file, recent=3), kv_policy="uncomp-v1")
    assert as_published is not None
    assert as_published.recent_tokens == as_published.window == 8
    for given, shares in (
        ({"kv_settings": {"pooling": 7}}, "calibrated"),
        ({"kv_settings": {"shares": "policy"}}, "policy"),
        ({"kv_settings": {"shares": "pyramid"}}, "pyramid"),
        ({"kv_policy": "uncomp-v1"}, "policy"),  # as published
    ):
        found = own(sharing, **given)
        assert found is not None
        assert found.shares == shares


def test_server_without_queries_cannot_score_with_them() -> None:
    server = UncompConfig(keep=0.25, policy="streaming")
    with pytest.raises(RequestError, match="start it with one that does"):
        own(server, kv_policy="uniform")
    assert own(server, kv_policy="key_difference") is not None


@pytest.mark.parametrize("overrides", ["tighten", "forbid"])
def test_operator_can_forbid(overrides: str) -> None:
    server = UncompConfig(keep=0.25, overrides=overrides)
    for given in ({"kv_policy": "streaming"}, {"kv_settings": {"pooling": 7}}):
        with pytest.raises(RequestError):
            own(server, **given)
    assert request_settings({"kv_report": True}, server, 10).report  # asks for no change


def test_least_budget_follows_the_requests_own_window() -> None:
    given = {"kv_budget": 6, "kv_settings": {"window": 2, "sinks": 4}}
    assert request_settings(given, SERVER, 1000).budget == 6
    with pytest.raises(RequestError, match="at least 6"):
        request_settings({**given, "kv_budget": 5}, SERVER, 1000)


def test_everything_settable_is_a_setting() -> None:
    for name in set(SETTABLE) - {"calibration", "source", "window", "truncation"}:
        assert own_config(None, {name: getattr(SERVER, name)}, SERVER) == SERVER


def test_compressed_before_the_question_is_scored_by_another_policy() -> None:
    server = UncompConfig(keep=0.25)
    assert own(server) is None
    early = own(server, kv_compact_at=500)
    assert early == UncompConfig(keep=0.25, policy="hybrid")
    settings = own(server, kv_compact_at=500, kv_settings={"pooling": 8})
    assert settings == UncompConfig(keep=0.25, policy="hybrid", pooling=8)
    assert own(server, kv_compact_at=500, kv_policy="adakv") is None
    assert own(server, kv_compact_at=500, kv_compress=False) is None
    assert own(UncompConfig(keep=0.25, overrides="tighten"), kv_compact_at=500) is not None


@pytest.mark.parametrize("policy", ["uniform", "streaming", "entropy"])
def test_a_server_with_another_policy_uses_it_before_the_question_too(policy: str) -> None:
    assert own(UncompConfig(keep=0.25, policy=policy), kv_compact_at=500) is None


def test_the_operator_names_the_policy_before_the_question() -> None:
    server = UncompConfig(keep=0.25, early_policy="prerope_key_difference")
    found = own(server, kv_compact_at=500)
    assert found is not None
    assert found.policy == "prerope_key_difference"
    assert own(UncompConfig(keep=0.25, early_policy="adakv"), kv_compact_at=500) is None
