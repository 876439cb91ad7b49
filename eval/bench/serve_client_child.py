"""Child of `serve_client`: vLLM's own serving benchmark, ``vllm.benchmarks.serve``, on demand.

One JSON object a line on stdin (``argv``; ``trace``: requests, or null; ``seed``), one a line on
stdout (``result`` or ``error``). A process of its own, because it prints, holds a tokenizer and
must not share an interpreter with the sampling; it stays, because importing vLLM takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from typing import Any


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the benchmark prints; what it prints goes to the log
    from vllm.benchmarks import serve

    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": _result(serve, order)}
        except (Exception, SystemExit):
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _result(serve: Any, order: dict[str, Any]) -> dict[str, Any]:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm.benchmarks.serve")
    serve.add_cli_args(parser)
    arguments = parser.parse_args(order["argv"])
    if order["trace"] is None:
        found = serve.main(arguments)
    else:
        found = _replay(serve, arguments, order["trace"], order["seed"])
    for name in ("itls", "generated_texts"):  # long, and not used
        found.pop(name, None)
    return found


def _replay(serve: Any, arguments: Any, trace: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The requests of a trace instead of a data set of vLLM's.

    vLLM's own ``timed_trace`` has no text prompts, sends empty ones where a trace has no block ids,
    and draws other tokens in every process.
    """
    original = serve.get_samples

    def samples(_: Any, tokenizer: Any) -> list[Any]:
        vocabulary = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.all_special_ids))
        return [_sample(r, tokenizer, vocabulary, f"{seed}/{i}") for i, r in enumerate(trace)]

    serve.get_samples = samples
    try:
        return serve.main(arguments)
    finally:
        serve.get_samples = original


def _sample(request: dict[str, Any], tokenizer: Any, vocabulary: list[int], own: str) -> Any:
    from vllm.benchmarks.datasets.datasets import SampleRequest

    prompt: Any = request["prompt"]
    if prompt:
        length = len(tokenizer.encode(prompt))
    else:
        length = request["prompt_tokens"]
        block = request["block"] or length
        seed = own.split("/")[0]
        # A shared block has the same tokens wherever it occurs; without blocks nothing is shared.
        names = [f"{seed} block {b}" for b in request["blocks"]] or [own]
        drawn = [random.Random(name).choices(vocabulary, k=block) for name in names]
        prompt = [token for tokens in drawn for token in tokens][:length]
    return SampleRequest(
        prompt=prompt,
        prompt_len=length,
        expected_output_len=request["output_tokens"],
        timestamp=request["seconds"],
    )


if __name__ == "__main__":
    main()
