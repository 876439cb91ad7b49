"""Does a cache drift that is compacted while it grows?

`python -m uncomp.eval.ablation.drift MODEL -o FILE.csv`: the live engine is made to say how a text
really goes on, thousands of tokens after a prompt, with its full cache and with caches that are
compacted at other intervals. Per stretch of tokens: the KL divergence from the full cache and the
likelihood that is lost. Drift is a loss that grows from one stretch to the next.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uncomp.eval.engines.base import Answer, Ask
from uncomp.eval.engines.local import LocalEngine
from uncomp.eval.tasks.sources import builtin_names, builtin_text
from uncomp.eval.tasks.teacher_forcing import TokenRecord, scored_values

EVERY = (0, 128, 512, 2048)


def cases(keep: float, budget: int, calibrated: bool) -> dict[str, dict[str, Any]]:
    """Name -> ``extra_args`` of a request; 0 is compaction after the prompt alone."""
    found: dict[str, dict[str, Any]] = {"full": {"kv_compress": "false"}}
    for shares in ("policy", "calibrated") if calibrated else ("policy",):
        for size in ({"kv_keep": keep}, {"kv_budget": budget}):
            for every in EVERY:
                own = json.dumps({"recompact_every": every, "shares": shares})
                name = f"{shares} {json.dumps(size)[1:-1]} every {every}".replace('"', "")
                found[name] = {**size, "kv_settings": own, "kv_report": "true"}
    return found


def stretches(
    full: Sequence[TokenRecord], compressed: Sequence[TokenRecord], length: int
) -> list[dict[str, float]]:
    """`scored_values` of every `length` tokens; a shorter rest is left out."""
    whole = len(full) // length * length
    return [
        scored_values(full[at : at + length], compressed[at : at + length])
        for at in range(0, whole, length)
    ]


def rows(answers: dict[str, Answer], length: int) -> list[dict[str, Any]]:
    """Mean over prompts; keys of the answers are `prompt/case`.

    Returns:
        A row a case and stretch: `case`, `tokens` generated at its end, `kl`, `nll_increase`,
        `top1_agreement`, and `kept`, the part of the bytes that the last compaction left.
    """
    parts: dict[str, list[list[dict[str, float]]]] = {}
    kept: dict[str, list[float]] = {}
    for key, answer in answers.items():
        prompt, _, case = key.partition("/")
        if case == "full":
            continue
        full = answers[f"{prompt}/full"].records
        parts.setdefault(case, []).append(stretches(full, answer.records, length))
        kept.setdefault(case, []).append(float((answer.kept or {}).get("keep", 1.0)))
    found = []
    for case, prompts in parts.items():
        for i, same in enumerate(zip(*prompts, strict=True)):
            row: dict[str, Any] = {"case": case, "tokens": (i + 1) * length, "prompts": len(same)}
            for name in ("kl", "nll_increase", "top1_agreement"):
                row[name] = round(sum(values[name] for values in same) / len(same), 5)
            row["kept"] = round(sum(kept[case]) / len(kept[case]), 4)
            found.append(row)
    return found


def main() -> None:
    args = _arguments()
    settings: dict[str, Any] = {"keep": 1.0}
    if args.calibration:
        settings |= {"shares": "calibrated", "calibration": args.calibration}
    length = args.prompt + args.tokens
    given = {"max_model_len": length + 32, "max_num_seqs": args.at_once, "enforce_eager": True}
    given["kv_cache_memory_bytes"] = args.pool_bytes
    engine = LocalEngine(args.model, settings, given)
    groups = []
    for name in builtin_names():
        ids = engine.tokenizer.encode(builtin_text(name)[0][: 12 * length * args.prompts])
        for i in range(args.prompts):
            part = ids[i * length : (i + 1) * length]
            if len(part) < length:
                raise SystemExit(f"{name} is too short for {args.prompts} prompts")
            groups.append(
                [
                    Ask(
                        f"{name}-{i}/{case}",
                        part[: args.prompt],
                        args.tokens,
                        extra,
                        forced=tuple(part[args.prompt :]),
                        top_logprobs=20,
                    )
                    for case, extra in cases(args.keep, args.budget, bool(args.calibration)).items()
                ]
            )
    answers = {}
    for answer in engine.answer(groups):
        answers[answer.key] = answer
        print(f"{answer.key}: {answer.seconds:.0f} s, {answer.kept}", file=sys.stderr, flush=True)
    engine.close()
    table = rows(answers, args.stretch)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.ablation.drift",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model")
    parser.add_argument("-o", "--out", required=True, type=Path, help="CSV to write")
    parser.add_argument("--calibration", help="file of `uncomp calibrate`: calibrated shares too")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--tokens", type=int, default=3072, help="forced after the prompt")
    parser.add_argument("--stretch", type=int, default=512, help="tokens of a row")
    parser.add_argument("--prompts", type=int, default=1, help="of each packaged text")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--at-once", type=int, default=34)
    parser.add_argument("--pool-bytes", type=int, default=3_000_000_000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
