"""Makes a model say a given text, token by token, so that its probabilities can be read.

A logits processor of vLLM's: give its path to ``LLM(logits_processors=[...])`` or
``--logits-processors uncomp.eval.engines.forced:ForcedTokens``. Requests without the
``forced_token_ids`` entry are untouched. The log-probabilities that vLLM reports are those before
processors (``logprobs_mode=raw_logprobs``, its default), which is what makes this a measurement.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

from uncomp.eval.engines.base import FORCED

PATH = f"{__name__}:ForcedTokens"


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves one token possible at each position."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises:
        ValueError: ``forced_token_ids`` is not a list of token ids.
        """
        given = (sampling_params.extra_args or {}).get(FORCED)
        if given is not None and not (
            isinstance(given, list) and given and all(type(token) is int for token in given)
        ):
            raise ValueError(f"{FORCED}={given!r}: must be a list of token ids")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        tokens: list[int] | None = (params.extra_args or {}).get(FORCED)
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> Any:
            if len(output_ids) >= len(tokens):
                return logits
            logits.fill_(float("-inf"))
            logits[tokens[len(output_ids)]] = 0.0
            return logits

        return force
