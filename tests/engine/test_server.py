"""`uncomp serve` as its users meet it: one server, real HTTP, a pool too small for its traffic."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from uncomp.cli.server import Server, ServerError
from uncomp.eval.engines.base import Ask
from uncomp.eval.engines.http import HttpEngine
from uncomp.eval.methods import METHODS, cases, find

LIMIT, BLOCK = 1024, 32
ALWAYS = 4 + 32  # sinks and window
#: bytes of about 80 blocks
POOL = {"bfloat16": 60_000_000, "float32": 120_000_000}
_salt = itertools.count()


@pytest.fixture(scope="module")
def server(
    demo_model: Path, served_dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    arguments = [
        str(demo_model), "--served-model-name", "m", "--kv-keep", "0.25", "--kv-min-tokens", "64",
        "--max-model-len", str(LIMIT), "--max-num-seqs", "8", "--enforce-eager",
        "--kv-cache-memory-bytes", str(POOL[served_dtype]), "--dtype", served_dtype,
        "--structured-outputs-config.backend", "xgrammar",
        "--structured-outputs-config.disable_any_whitespace", "true",
        "--logits-processors", "uncomp.eval.engines.forced:ForcedTokens",
    ]  # fmt: skip
    environment = {"UNCOMP_METRICS_DIR": str(folder / "metrics")}
    with Server(arguments, folder / "log", environment) as running:
        yield running


def prompt(length: int, seed: int = 0) -> list[int]:
    return [100 + (i * i * 7 + i * 31 + seed * 101) % 20000 for i in range(length)]


def body(tokens: list[int] | str, settings: dict[str, Any] | None = None, **more: Any) -> dict:
    """A greedy completion of 8 tokens that finds nothing in the prefix cache."""
    base = {"model": "m", "prompt": tokens, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    base["cache_salt"] = f"salt {next(_salt)}"
    return {**base, **({"vllm_xargs": settings} if settings is not None else {}), **more}


def complete(server: Server, *args: Any, **more: Any) -> dict[str, Any]:
    return server.post("/v1/completions", body(*args, **more))["choices"][0]


@pytest.fixture
def moved(server: Server) -> Callable[[], dict[str, float]]:
    """How far the metrics have moved since the test began."""
    before = server.metrics()
    return lambda: {name: value - before[name] for name, value in server.metrics().items()}


def test_metrics_are_on_vllms_endpoint(server: Server) -> None:
    text = server.get("/metrics")
    names = set(re.findall(r"^# TYPE uncomp:(\w+) (\w+)$", text, re.M))
    counters = ("requests_compressed", "compactions", "tokens_seen", "tokens_kept", "blocks_freed",
                "score_seconds", "move_seconds", "refusals")  # fmt: skip
    assert {(f"{name}_total", "counter") for name in counters} <= names
    assert {("kv_blocks_held", "gauge"), ("kv_bytes_held", "gauge")} <= names
    assert ("kept_ratio", "histogram") in names
    assert 'uncomp:compactions_total{engine="0",model_name="m"}' in text
    assert "vllm:num_requests_running" in text


def test_a_prompt_is_compressed(server: Server, moved: Callable[[], dict[str, float]]) -> None:
    complete(server, prompt(512))
    seen = moved()
    assert seen["uncomp:requests_compressed_total"] == seen["uncomp:compactions_total"] == 1
    assert seen["uncomp:blocks_freed_total"] == 16 - 4
    assert seen["uncomp:tokens_seen_total"] == 4 * seen["uncomp:tokens_kept_total"]
    assert seen["uncomp:kept_ratio_count"] == 1
    assert seen["uncomp:kept_ratio_sum"] == pytest.approx(0.25)
    assert seen["uncomp:score_seconds_total"] > 0
    assert seen["uncomp:move_seconds_total"] > 0
    assert seen["uncomp:kv_blocks_held"] == 0


@pytest.mark.parametrize("off", [False, "off", 0], ids=repr)
def test_opt_out(server: Server, moved: Callable[[], dict[str, float]], off: Any) -> None:
    complete(server, prompt(512), {"kv_compress": off})
    assert moved()["uncomp:compactions_total"] == 0
    assert moved()["uncomp:refusals_total"] == 1
    assert 'reason="opted_out"' in server.get("/metrics")


@pytest.mark.parametrize(
    ("settings", "freed"),
    [
        ({"kv_budget": 64}, 16 - 2),
        ({"kv_budget": "64"}, 16 - 2),
        ({"kv_budget": 100000}, 0),
        ({"kv_keep": 0.5}, 16 - 8),
        ({"kv_keep": 1}, 0),
        ({"kv_protect": "0:200"}, 16 - math.ceil((200 + ALWAYS) / BLOCK)),
        ({"kv_protect": ["0:100", "-100:"]}, 16 - math.ceil((200 + ALWAYS) / BLOCK)),
        ({"kv_protect": ":", "kv_keep": 0.1}, 0),
    ],
    ids=json.dumps,
)
def test_own_settings_of_a_request(
    server: Server,
    moved: Callable[[], dict[str, float]],
    settings: dict[str, Any],
    freed: int,
) -> None:
    complete(server, prompt(512), settings)
    assert moved()["uncomp:blocks_freed_total"] == freed


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_keep": 0}, "kv_keep=0: must be a number in (0, 1]"),
        ({"kv_keep": 1.01}, "must be a number in (0, 1]"),
        ({"kv_keep": "half"}, "kv_keep='half': must be a number in (0, 1]"),
        ({"kv_budget": 3}, "at least 36"),
        ({"kv_budget": 99.5}, "whole number"),
        ({"kv_keep": 0.5, "kv_budget": 64}, "not both"),
        ({"kv_compress": "perhaps"}, "must be true or false"),
        ({"kv_protect": "0-200"}, "slices of the prompt"),
        ({"kv_ratio": 0.5}, "unknown setting ['kv_ratio']; allowed: ['kv_compress'"),
    ],
    ids=json.dumps,
)
def test_bad_settings_get_a_400(server: Server, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ServerError) as caught:
        complete(server, prompt(100), settings)
    assert caught.value.status == 400
    assert says in json.loads(str(caught.value).partition(": ")[2])["error"]["message"]


def test_bad_settings_in_the_chat_api(server: Server) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    chat["vllm_xargs"] = {"kv_keep": 7}
    with pytest.raises(ServerError, match="kv_keep=7") as caught:
        server.post("/v1/chat/completions", chat)
    assert caught.value.status == 400
    # Before the stream opens: with status 200 the error would be an event that clients overlook.
    with pytest.raises(ServerError, match="kv_keep=7") as caught:
        list(server.stream("/v1/chat/completions", chat))
    assert caught.value.status == 400


def test_streaming_equals_the_whole_answer(server: Server) -> None:
    whole = complete(server, prompt(300), max_tokens=20)["text"]
    events = server.stream("/v1/completions", body(prompt(300), max_tokens=20))
    assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_stop_string(server: Server) -> None:
    whole = complete(server, prompt(300), max_tokens=20)["text"]
    stop = whole[len(whole) // 2 :][:3]
    answer = complete(server, prompt(300), max_tokens=20, stop=[stop])
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == whole[: whole.index(stop)]


def test_logprobs(server: Server) -> None:
    answer = complete(server, prompt(300), logprobs=5)
    assert len(answer["logprobs"]["token_logprobs"]) == 8
    assert all(len(best) >= 5 for best in answer["logprobs"]["top_logprobs"])


def test_two_samples(server: Server, moved: Callable[[], dict[str, float]]) -> None:
    request = body(prompt(300), n=2, temperature=0.9, seed=1)
    choices = server.post("/v1/completions", request)["choices"]
    assert len(choices) == 2
    assert choices[0]["text"] != choices[1]["text"]
    assert moved()["uncomp:requests_compressed_total"] == 2


def test_structured_output(server: Server, moved: Callable[[], dict[str, float]]) -> None:
    pattern = r"[0-9]{3}-[a-f]{4}"
    outputs = {"structured_outputs": {"regex": pattern}, "ignore_eos": False, "max_tokens": 40}
    assert re.fullmatch(pattern, complete(server, prompt(300), **outputs)["text"])
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    outputs["structured_outputs"] = {"json": schema}
    text = complete(server, prompt(300), **outputs)["text"]
    assert set(json.loads(text)) == {"ok", "size"}
    assert moved()["uncomp:compactions_total"] >= 2


def test_the_evaluation_asks_over_http(server: Server, demo_model: Path) -> None:
    """Methods per request, forced text and what was kept, through the public API alone."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    engine = HttpEngine(f"http://127.0.0.1:{server.port}/v1", tokenizer)
    assert engine.compresses
    assert engine.max_model_len == LIMIT
    methods = find(["snapkv", "adakv"])
    asks = []
    for case in cases(methods, (0.5,)):
        extra = METHODS[case.method].request(case.keep)
        asks.append(Ask(f"{case.method} answer", prompt(512), 8, extra, stop=("e",)))
        forced = tuple(prompt(6))
        asks.append(
            Ask(f"{case.method} forced", prompt(512), 0, extra, forced=forced, top_logprobs=5)
        )
    answers = {a.key: a for a in engine.answer([asks])}
    assert len(answers) == 6
    for case in cases(methods, (0.5,)):
        answer, forced_one = answers[f"{case.method} answer"], answers[f"{case.method} forced"]
        assert forced_one.tokens == len(forced_one.records) == 6
        assert all(len(record.top_ids) == 5 for record in forced_one.records)
        assert "e" not in answer.text
        for one in (answer, forced_one):
            assert (one.kept or {}).get("keep") == (None if case.method == "full" else 0.5)
    # Before anything is dropped, the first token is as likely under every method.
    firsts = [answers[f"{m.name} forced"].records[0].forced for m in methods]
    assert firsts == pytest.approx([firsts[0]] * 3, abs=0.2)  # bfloat16, other batches


def test_forced_text_must_be_tokens(server: Server) -> None:
    with pytest.raises(ServerError, match="must be a list of token ids") as error:
        complete(server, prompt(32), {"forced_token_ids": "12"})
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("tokens", "generated"), [(1, 8), (LIMIT - 1, 1), (LIMIT - 40, 40)], ids=["1", "max-1", "max"]
)
def test_shortest_and_longest_prompts(server: Server, tokens: int, generated: int) -> None:
    answer = server.post("/v1/completions", body(prompt(tokens), max_tokens=generated))
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == generated


def test_too_long_a_prompt_gets_a_400(server: Server) -> None:
    with pytest.raises(ServerError) as caught:
        complete(server, prompt(LIMIT + 1))
    assert caught.value.status == 400


def test_unicode(server: Server, moved: Callable[[], dict[str, float]]) -> None:
    text = "Größe 数字 ٣ 🜁 e\u0301 \u202e\u05d8\u05e7 " * 12
    assert complete(server, text)["finish_reason"] == "length"
    assert moved()["uncomp:compactions_total"] == 1


def test_more_requests_than_the_pool_holds(server: Server) -> None:
    # 12 prompts of 640 tokens need 240 blocks; the pool has about 80
    def one(seed: int) -> int:
        settings = {"kv_compress": bool(seed % 3)}
        request = body(prompt(640, seed), settings, max_tokens=40)
        return server.post("/v1/completions", request)["usage"]["completion_tokens"]

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == [40] * 12


def test_client_that_hangs_up(server: Server) -> None:
    events = server.stream("/v1/completions", body(prompt(600), max_tokens=300))
    next(events)
    events.close()


def test_the_server_lives_on_and_holds_nothing(server: Server) -> None:
    assert complete(server, prompt(512))["finish_reason"] == "length"
    deadline = time.monotonic() + 20
    while server.metrics()["uncomp:kv_blocks_held"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.metrics()["uncomp:kv_blocks_held"] == 0
    assert server.process.poll() is None
