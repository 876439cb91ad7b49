"""Prompts of an exact length and a loop that times an engine step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import resources
from typing import Any


def prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """``count`` different token lists of exactly ``length`` tokens of real text.

    Raises:
        ValueError: the packaged text is too short.
    """
    folder = resources.files("uncomp.data")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".txt"))
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in names)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stride = (len(ids) - length) // count
    if stride < 1:
        raise ValueError(
            f"{count} prompts of {length} tokens asked for, the text has {len(ids)}: ask for fewer"
        )
    return [ids[i * stride + seed : i * stride + seed + length] for i in range(count)]


@dataclass
class Run:
    """One batch of requests, timed.

    Attributes:
        prefill_seconds: from the first request to the last first token.
        decode_seconds, decode_tokens: steps during which every request was decoding.
        texts: outputs in request order.
        token_times: (time, tokens) of every step.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    total_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def decode_rate(self) -> float:
        """Tokens per second while all requests decode."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def run(
    engine: Any,
    name: str,
    token_lists: list[list[int]],
    max_tokens: int,
    extra_args: dict[str, Any] | None = None,
    salt: str | None = None,
) -> Run:
    """Send all requests at once, step until they are done.

    Args:
        engine: vLLM's ``LLMEngine``.
        name: prefix of the request ids.
        salt: keeps the prefix cache of another run out.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args
    )
    start = time.perf_counter()
    ids = [f"{name}-{i}" for i in range(len(token_lists))]
    for request_id, tokens in zip(ids, token_lists, strict=True):
        prompt = TokensPrompt(prompt_token_ids=tokens)
        if salt is not None:
            prompt["cache_salt"] = salt
        engine.add_request(request_id, prompt, params)
    done: dict[str, int] = {request_id: 0 for request_id in ids}
    texts: dict[str, str] = {}
    result = Run()
    before = start
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        all_decoding = all(done.values()) and not texts
        fresh = 0
        for output in outputs:
            length = len(output.outputs[0].token_ids)
            fresh += length - done[output.request_id]
            done[output.request_id] = length
            if output.finished:
                texts[output.request_id] = output.outputs[0].text
        if all_decoding:
            result.decode_seconds += now - before
            result.decode_tokens += fresh
            result.step_seconds.append(now - before)
        elif not result.prefill_seconds and all(done.values()):
            result.prefill_seconds = now - start
        before = now
    result.total_seconds = time.perf_counter() - start
    result.texts = [texts[request_id] for request_id in ids]
    return result
