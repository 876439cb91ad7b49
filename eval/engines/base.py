"""What an evaluation asks of an engine, whether it runs here or behind HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from uncomp.eval.tasks.base import Tokenizer
from uncomp.eval.tasks.teacher_forcing import TokenRecord

#: name of the ``extra_args`` entry that :mod:`uncomp.eval.engines.forced` reads
FORCED = "forced_token_ids"


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        key: unique; comes back with the answer.
        prompt: token ids.
        max_tokens: tokens to generate at most; greedy.
        extra: per-request settings of the plugin.
        stop: strings that end the answer.
        forced: token ids the model is made to say; ``max_tokens`` is their number then.
        top_logprobs: best tokens whose log-probabilities come back, for forced requests.
        ignore_eos: go on to ``max_tokens`` whatever the model says, so that work is equal.
    """

    key: str
    prompt: Sequence[int]
    max_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    forced: tuple[int, ...] = ()
    top_logprobs: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        key: of the request.
        text, tokens: generated text and number of tokens.
        finish: vLLM's finish reason.
        seconds: from sending to the last token.
        kept: ``kv_transfer_params.uncomp`` of the plugin (see ``uncomp.engine.report``), or None.
        records: for forced requests, per token.
    """

    key: str
    text: str
    tokens: int
    finish: str
    seconds: float
    kept: Mapping[str, Any] | None = None
    records: tuple[TokenRecord, ...] = ()


class EngineError(RuntimeError):
    """The engine cannot do what was asked, or failed; the message says which and what to do."""


class EngineMissing(EngineError):
    """The engine is not installed in this environment; others of the same run may be."""


class Engine(Protocol):
    """An engine that answers requests.

    Attributes:
        tokenizer: of the model, with ``apply_chat_template``.
        max_model_len: tokens of prompt and answer at most.
        compresses: whether the plugin is active, so that methods other than the full cache work.
    """

    tokenizer: Tokenizer
    max_model_len: int
    compresses: bool

    def facts(self) -> dict[str, Any]:
        """What identifies engine and model in a result; JSON-ready."""

    def answer(self, groups: Sequence[Sequence[Ask]]) -> Iterator[Answer]:
        """Answers as they come.

        Args:
            groups: requests of one group have the same prompt: it is computed once, for the first
                of them, and the others find it in the prefix cache.

        Raises:
            EngineError: a request was refused, or the engine died.
        """

    def close(self) -> None:
        """End the engine and its processes."""
