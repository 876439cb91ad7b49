"""Any server with an OpenAI completions API; ``uncomp serve`` for methods other than full KV."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from uncomp.eval.engines.base import FORCED, Answer, Ask, EngineError
from uncomp.eval.engines.records import token_record
from uncomp.eval.tasks.teacher_forcing import TokenRecord

_ID = "token_id:"


class HttpEngine:
    """Talks to a running server.

    Args:
        base_url: such as ``http://localhost:8000/v1``.
        tokenizer: of the model, loaded here: prompts are sent as token ids.
        model: name on the server; default: the only one it serves.
        max_model_len: if the server does not say.
        concurrency: requests at a time.
        key: bearer token.
        timeout: seconds for one answer.

    Raises:
        EngineError: no server there, or not one model.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: Any,
        model: str | None = None,
        max_model_len: int | None = None,
        concurrency: int = 32,
        key: str | None = None,
        timeout: float = 3600,
    ) -> None:
        self.tokenizer, self._timeout = tokenizer, timeout
        self._url, self._concurrency = base_url.rstrip("/"), concurrency
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        served = {entry["id"]: entry for entry in self._get("/models").get("data", [])}
        if model is None and len(served) != 1:
            raise EngineError(f"{base_url} serves {sorted(served)}: say which with --served-model")
        self.model = model or next(iter(served))
        if self.model not in served:
            raise EngineError(f"{base_url} does not serve {self.model!r}, but {sorted(served)}")
        length = max_model_len or served[self.model].get("max_model_len")
        if length is None:
            raise EngineError(f"{base_url} does not say its longest prompt: give --max-model-len")
        self.max_model_len = int(length)
        self._root = served[self.model].get("root")
        self.compresses = self._has_plugin()

    def facts(self) -> dict[str, Any]:
        return {
            "engine": "server",
            "model": self._root or self.model,
            "server": self._version(),
            "max_model_len": self.max_model_len,
        }

    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            running: set[Future[Answer]] = set()
            rest_of: dict[Future[Answer], Sequence[Ask]] = {}
            waiting = [list(group) for group in groups if group]
            try:
                while waiting or running:
                    while waiting and len(running) < self._concurrency:
                        first, *rest = waiting.pop(0)
                        future = pool.submit(self._ask, first)
                        rest_of[future] = rest
                        running.add(future)
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        # The prompt is in the prefix cache now.
                        running |= {pool.submit(self._ask, a) for a in rest_of.pop(future, ())}
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def close(self) -> None:
        """Nothing to end: the server is not ours."""

    def _ask(self, ask: Ask) -> Answer:
        # A server without the plugin serves the full cache only (the run sees to that).
        extra = dict(ask.extra) if self.compresses else {}
        if ask.forced:
            extra[FORCED] = list(ask.forced)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(ask.prompt),
            "max_tokens": len(ask.forced) or ask.max_tokens,
            "temperature": 0,
        }
        if ask.stop:
            body["stop"] = list(ask.stop)
        if ask.ignore_eos:
            body["ignore_eos"] = True
        if extra:
            body["vllm_xargs"] = extra
        if ask.forced:
            body |= {
                "logprobs": ask.top_logprobs,
                "return_tokens_as_token_ids": True,
                "ignore_eos": True,
            }
        since = time.perf_counter()
        answer = self._post("/completions", body, ask.key)
        choice = answer["choices"][0]
        return Answer(
            ask.key,
            choice["text"],
            answer.get("usage", {}).get("completion_tokens", 0),
            choice.get("finish_reason") or "",
            time.perf_counter() - since,
            (answer.get("kv_transfer_params") or {}).get("uncomp"),
            _records(ask, choice) if ask.forced else (),
        )

    def _has_plugin(self) -> bool:
        root = self._url.removesuffix("/v1")
        try:
            with self._open(f"{root}/metrics", None) as response:
                return b"uncomp:" in response.read()
        except (OSError, EngineError):
            return False

    def _version(self) -> str:
        try:
            with self._open(self._url.removesuffix("/v1") + "/version", None) as response:
                return f"vllm {json.load(response)['version']}"
        except (OSError, EngineError, ValueError, KeyError):
            return "unknown"

    def _get(self, path: str) -> Any:
        try:
            with self._open(self._url + path, None) as response:
                return json.load(response)
        except OSError as error:
            raise EngineError(f"no OpenAI server at {self._url}: {error}") from error

    def _post(self, path: str, body: dict[str, Any], key: str) -> Any:
        try:
            with self._open(self._url + path, json.dumps(body).encode()) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:500]
            raise EngineError(f"{key}: status {error.code}: {text}") from error
        except OSError as error:
            raise EngineError(f"{key}: {self._url} does not answer: {error}") from error

    def _open(self, url: str, data: bytes | None) -> Any:
        request = urllib.request.Request(url, data, self._headers)
        return urllib.request.urlopen(request, timeout=self._timeout)


def _records(ask: Ask, choice: dict[str, Any]) -> tuple[TokenRecord, ...]:
    found = choice["logprobs"]
    said = tuple(int(token.removeprefix(_ID)) for token in found["tokens"])
    if said != ask.forced:
        raise EngineError(
            f"{ask.key}: the server did not say the given text; start it with "
            f"--logits-processors uncomp.eval.engines.forced:ForcedTokens"
        )
    records = []
    rows = zip(said, found["token_logprobs"], found["top_logprobs"], strict=True)
    for token, own, top in rows:
        by_id = {int(name.removeprefix(_ID)): value for name, value in top.items()}
        records.append(token_record(token, {**by_id, token: own}, ask.top_logprobs))
    return tuple(records)
