"""A vLLM engine in this process (its core runs in a process of its own)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from uncomp.eval.engines.base import FORCED, Answer, Ask, EngineError, EngineMissing
from uncomp.eval.engines.identity import identity
from uncomp.eval.engines.records import token_record
from uncomp.eval.tasks.teacher_forcing import TokenRecord


class LocalEngine:
    """Starts a vLLM engine and drives it.

    Args:
        model: folder or hub name.
        settings: of the plugin (``additional_config["uncomp"]``); None starts stock vLLM.
        arguments: further arguments of ``LLM``.
        top_logprobs: most that a request will ask for.

    Raises:
        EngineError: vLLM is missing or did not start.
    """

    def __init__(
        self,
        model: str,
        settings: dict[str, Any] | None,
        arguments: dict[str, Any] | None = None,
        top_logprobs: int = 20,
    ) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise EngineMissing("vLLM is not installed: pip install 'uncomp[vllm]'") from error
        from uncomp.eval.engines.forced import PATH

        given: dict[str, Any] = {
            "logits_processors": [PATH],
            "max_logprobs": top_logprobs,
            "disable_log_stats": False,
            **(arguments or {}),
        }
        if settings is not None:
            given["additional_config"] = {
                **given.get("additional_config", {}),
                "uncomp": settings,
            }
        try:
            self._llm = LLM(model, **given)
        except Exception as error:
            raise EngineError(f"the engine did not start: {error}") from error
        self._engine = self._llm.llm_engine
        self.tokenizer: Any = self._llm.get_tokenizer()
        config = self._engine.vllm_config
        self.max_model_len = config.model_config.max_model_len
        self.compresses = settings is not None
        self._most = 2 * config.scheduler_config.max_num_seqs

    def facts(self) -> dict[str, Any]:
        config = self._engine.vllm_config
        model, cache = config.model_config, config.cache_config
        text = model.hf_text_config
        return {
            "engine": "in process",
            **identity(
                model.model, model.revision or getattr(model.hf_config, "_commit_hash", None)
            ),
            "architecture": (model.hf_config.architectures or ["?"])[0],
            "layers": text.num_hidden_layers,
            "kv_heads": model.get_total_num_kv_heads(),
            "query_heads": text.num_attention_heads,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_dtype": cache.cache_dtype,
            "block_size": cache.block_size,
            "blocks": cache.num_gpu_blocks,
            "max_model_len": model.max_model_len,
            "kv_bytes_per_token": self._token_bytes(),
        }

    def _token_bytes(self) -> int:
        """Of the full cache, K and V of all layers and KV heads."""
        config = self._engine.vllm_config
        model = config.model_config
        dtype: Any = model.dtype
        size = 1 if "fp8" in config.cache_config.cache_dtype else dtype.itemsize
        heads = model.get_total_num_kv_heads() * model.get_head_size()
        return 2 * model.hf_text_config.num_hidden_layers * heads * size

    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        waiting = deque(list(group) for group in groups if group)
        #: requests that wait for the first of their group to have computed the prompt
        behind: dict[str, list[Ask]] = {}
        sent: dict[str, tuple[Ask, float]] = {}
        while waiting or behind or sent:
            # One prompt at a time is ahead of the others: its group then joins the batch.
            while waiting and not behind and len(sent) < self._most:
                first, *rest = waiting.popleft()
                self._send(first, sent)
                if rest:
                    behind[first.key] = rest
            for output in self._engine.step():
                for ask in behind.pop(output.request_id, ()):
                    self._send(ask, sent)
                if output.finished:
                    ask, since = sent.pop(output.request_id)
                    yield _answer(ask, output, time.perf_counter() - since)

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _send(self, ask: Ask, sent: dict[str, tuple[Ask, float]]) -> None:
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=list(ask.prompt))
        try:
            self._engine.add_request(ask.key, prompt, _sampling(ask))
        except ValueError as error:
            raise EngineError(f"{ask.key} was refused: {error}") from error
        sent[ask.key] = (ask, time.perf_counter())


def _sampling(ask: Ask) -> Any:
    from vllm import SamplingParams

    extra = dict(ask.extra)
    if ask.forced:
        extra[FORCED] = list(ask.forced)
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(ask.forced) or ask.max_tokens,
        stop=list(ask.stop) or None,
        ignore_eos=ask.ignore_eos or bool(ask.forced),
        logprobs=ask.top_logprobs if ask.forced else None,
        extra_args=extra or None,
    )


def _answer(ask: Ask, output: Any, seconds: float) -> Answer:
    one = output.outputs[0]
    records: tuple[TokenRecord, ...] = ()
    if ask.forced:
        if tuple(one.token_ids) != ask.forced:
            raise EngineError(
                f"{ask.key}: the engine did not say the given text; was it started with the "
                f"logits processor uncomp.eval.engines.forced:ForcedTokens?"
            )
        records = tuple(
            token_record(
                token, {t: entry.logprob for t, entry in entries.items()}, ask.top_logprobs
            )
            for token, entries in zip(ask.forced, one.logprobs, strict=True)
        )
    return Answer(
        ask.key,
        one.text,
        len(one.token_ids),
        one.finish_reason or "",
        seconds,
        (output.kv_transfer_params or {}).get("uncomp"),
        records,
    )
