"""``python -m uncomp.eval.bench NAME``: run a benchmark, print its table, write its rows.

cpu  throughput, memory and overhead on the CPU engine (ten minutes with bfloat16 in
     hardware; an hour and more with --dtype float32 on a CPU without)
prefill  time to first token of pruned prompts against stock vLLM
gpu  kernels and engine on a GPU

prefill and gpu have options of their own: gpu --help
"""

from __future__ import annotations

import argparse
import sys

from uncomp.eval.bench import cpu, rows


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 when every bar is reached, 1 when one is missed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["prefill"]:
        from uncomp.eval.bench import prefill_main

        return prefill_main.main(arguments[1:])
    if arguments[:1] == ["gpu"]:
        from uncomp.eval.bench import gpu

        return gpu.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m uncomp.eval.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=["cpu", "gpu", "prefill"])
    parser.add_argument("--model", help="checkpoint or hub name (default: the demo model)")
    parser.add_argument("--tokens", type=int, help="prompt length")
    parser.add_argument("--requests", type=int, help="batch size")
    parser.add_argument("--output", type=int, default=cpu.Setting.output)
    parser.add_argument("--keep", type=float, default=cpu.Setting.keep)
    parser.add_argument("--policy", default=cpu.Setting.policy)
    parser.add_argument("--threads", default=cpu.Setting.threads, help="cores, e.g. 0-1")
    parser.add_argument("--dtype", default=cpu.Setting.dtype, help="float32 where bfloat16 is slow")
    parser.add_argument(
        "--rounds", type=int, default=cpu.Setting.rounds, help="of engines that do not compress"
    )
    parser.add_argument("--name", help="of the rows' file (default: the benchmark's)")
    parser.add_argument("--dry", action="store_true", help="print only, write no rows")
    given = parser.parse_args(arguments)
    if given.bench != "cpu":
        parser.error(f"{given.bench} has options of its own and comes first")
    model = given.model
    if model is None:
        from uncomp.demo_model import demo_model_path

        model = str(demo_model_path())

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    setting = cpu.Setting(
        model,
        given.requests or cpu.Setting.requests,
        given.tokens or cpu.Setting.tokens,
        given.output,
        given.keep,
        given.policy,
        rounds=given.rounds,
        threads=given.threads,
        dtype=given.dtype,
    )
    found = cpu.bench(setting, say)
    print(rows.table(found))
    if not given.dry:
        say(f"rows written to {rows.write(found, given.name or given.bench)}")
    return 1 if rows.missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
