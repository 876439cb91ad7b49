"""The client of an OpenAI server, against a small server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from uncomp.eval.engines.base import Ask, EngineError
from uncomp.eval.engines.http import HttpEngine


class Fake:
    """Answers "echo N" to a prompt of N tokens; keeps what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.models = [{"id": "m", "root": "org/m", "max_model_len": 100}]
        self.metrics = "uncomp:compactions_total 0\n"
        self.status = 200
        self.forced = True
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = {
                    "/v1/models": json.dumps({"data": fake.models}),
                    "/metrics": fake.metrics,
                    "/version": '{"version": "0.0"}',
                }
                self._send(200, found[self.path])

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.bodies.append({**body, "key": self.headers.get("Authorization")})
                if fake.status == 200:
                    self._send(200, json.dumps(fake.answer(body)))
                else:
                    self._send(fake.status, '{"error": "kv_keep=7: must be in (0, 1]"}')

            def _send(self, status: int, text: str) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": f"echo {len(body['prompt'])}", "finish_reason": "stop"}
        forced = body.get("vllm_xargs", {}).get("forced_token_ids")
        if forced:
            said = forced if self.forced else [9] * len(forced)
            choice["logprobs"] = {
                "tokens": [f"token_id:{t}" for t in said],
                "token_logprobs": [-3.0 for _ in said],
                "top_logprobs": [{"token_id:5": -0.5, "token_id:6": -1.0} for _ in said],
            }
        kept = {"uncomp": {"kept_tokens": 3, "full_tokens": 12}}
        return {"choices": [choice], "usage": {"completion_tokens": 2}, "kv_transfer_params": kept}


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def ask(key: str = "a", **changes: Any) -> Ask:
    return Ask(key, (1, 2, 3), 7, **changes)


def test_answers_with_what_was_kept(fake: Fake) -> None:
    engine = HttpEngine(fake.url, None, key="secret")
    assert engine.max_model_len == 100
    assert engine.compresses
    assert engine.facts()["model"] == "org/m"
    [answer] = engine.answer([[ask(extra={"kv_keep": 0.5}, stop=("\n",))]])
    assert (answer.text, answer.tokens, answer.finish) == ("echo 3", 2, "stop")
    assert answer.kept == {"kept_tokens": 3, "full_tokens": 12}
    [body] = fake.bodies
    assert body["vllm_xargs"] == {"kv_keep": 0.5}
    assert body["prompt"] == [1, 2, 3]
    assert (body["max_tokens"], body["stop"], body["temperature"]) == (7, ["\n"], 0)
    assert body["key"] == "Bearer secret"


def test_every_request_of_every_group_is_answered(fake: Fake) -> None:
    """The first of a group alone; the others once it is done, when the prompt is cached."""
    groups = [[ask(f"{g}-{i}") for i in range(1 + g)] for g in range(5)]
    answers = list(HttpEngine(fake.url, None, concurrency=3).answer(groups))
    assert sorted(a.key for a in answers) == sorted(a.key for group in groups for a in group)
    order = [a.key for a in answers]
    for group in groups:
        assert order.index(group[0].key) == min(order.index(a.key) for a in group)


def test_forced_text_comes_back_with_its_probabilities(fake: Fake) -> None:
    engine = HttpEngine(fake.url, None)
    [answer] = engine.answer([[ask(forced=(8, 5), top_logprobs=2)]])
    first, second = answer.records
    assert (first.forced, first.top_ids, first.top_logprobs) == (-3.0, (5, 6), (-0.5, -1.0))
    assert second.forced == -3.0
    assert fake.bodies[0]["max_tokens"] == 2
    assert fake.bodies[0]["ignore_eos"]
    fake.forced = False
    with pytest.raises(EngineError, match=r"--logits-processors uncomp\.eval\.engines\.forced"):
        list(engine.answer([[ask(forced=(8, 5), top_logprobs=2)]]))


def test_a_server_without_the_plugin_is_known_as_such(fake: Fake) -> None:
    fake.metrics = "vllm:num_requests_running 0\n"
    engine = HttpEngine(fake.url, None)
    assert not engine.compresses
    list(engine.answer([[ask(extra={"kv_compress": "false"})]]))
    assert "vllm_xargs" not in fake.bodies[0]


def test_refusals_name_the_request_and_the_reason(fake: Fake) -> None:
    engine = HttpEngine(fake.url, None)
    fake.status = 400
    with pytest.raises(EngineError, match=r"a: status 400: .*must be in \(0, 1\]"):
        list(engine.answer([[ask()]]))


def test_which_model_must_be_clear(fake: Fake) -> None:
    fake.models = [{"id": "m"}, {"id": "n", "max_model_len": 5}]
    with pytest.raises(EngineError, match="say which with --served-model"):
        HttpEngine(fake.url, None)
    with pytest.raises(EngineError, match="does not serve 'o'"):
        HttpEngine(fake.url, None, "o")
    with pytest.raises(EngineError, match="--max-model-len"):
        HttpEngine(fake.url, None, "m")
    assert HttpEngine(fake.url, None, "n").max_model_len == 5


def test_no_server_is_said() -> None:
    with pytest.raises(EngineError, match="no OpenAI server at"):
        HttpEngine("http://127.0.0.1:9/v1", None)
