"""``python -m uncomp.eval.bench prefill``: the options, the table, the rows."""

from __future__ import annotations

import argparse
import sys

from uncomp.config import PREFILL_SCORES
from uncomp.eval.bench import prefill, rows


def main(arguments: list[str]) -> int:
    """Returns 0 when every bar is reached, 1 when one is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.bench prefill",
        description=prefill.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="checkpoint or hub name (default: the demo model)")
    parser.add_argument("--stages", help="first layers of the stages after the first")
    parser.add_argument("--lengths", default="4096,8000", help="prompt tokens")
    parser.add_argument("--keep", default="0.75,0.5,0.375", help="fractions in the last stage")
    parser.add_argument("--scores", default=prefill.Setting.scores, choices=PREFILL_SCORES)
    parser.add_argument("--repeat", type=int, default=prefill.Setting.repeat)
    parser.add_argument("--threads", default=prefill.Setting.threads, help="cores, e.g. 0-1")
    parser.add_argument("--dtype", default="auto", help="float32 where bfloat16 is slow")
    parser.add_argument("--name", default=prefill.NAME, help="of the rows' file")
    parser.add_argument("--dry", action="store_true", help="print only, write no rows")
    given = parser.parse_args(arguments)
    model, stages = given.model, given.stages
    if model is None:
        from uncomp.demo_model import demo_model_path

        model, stages = str(demo_model_path()), stages or prefill.DEMO_STAGES
    if stages is None:
        parser.error("--stages is needed with --model: `uncomp inspect` shows those of a file")
    found = prefill.bench(
        prefill.Setting(
            model,
            stages,
            tuple(int(n) for n in given.lengths.split(",")),
            tuple(float(k) for k in given.keep.split(",")),
            given.scores,
            given.repeat,
            given.threads,
            given.dtype,
        ),
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(rows.table(found))
    if not given.dry:
        print(f"rows written to {rows.write(found, given.name)}", file=sys.stderr)
    return 1 if rows.missed(found) else 0
