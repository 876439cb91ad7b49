"""`uncomp tune`: the smallest cache whose loss is below a limit, on your own data."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uncomp.cli.eval import guarded, named_values, words

_ABOUT = """Search policy, pooling, window and keep ratio for the fewest kept KV bytes whose loss
against the full cache is, with confidence, below a limit. Writes settings.yaml for
`uncomp serve MODEL --kv-config FILE`. The same command continues a run that was stopped.

  uncomp tune MODEL --data my.jsonl --max-loss 1
  uncomp tune MODEL --tasks ruler/niah_single_2 --lengths 4096 --samples 600 --max-loss 1

Status: 0 settings found, 1 none could be shown (or the engine failed), 2 wrong usage."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "tune",
        help="the smallest cache whose loss is below a limit, on your data",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or hub name; with --base-url: its tokenizer")
    parser.add_argument("--revision", help="of the hub model")
    _add_data(parser.add_argument_group("what is asked"))
    _add_search(parser.add_argument_group("search"))
    _add_tables(parser.add_argument_group("throughput and users"))
    parser.add_argument("--base-url", help="of a running server, e.g. http://localhost:8000/v1")
    parser.add_argument("--served-model", help="name on that server")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="argument of vllm.LLM, e.g. enforce_eager=true",
    )
    parser.add_argument("--out", type=Path, help="folder (default: uncomp-tune/ and a name)")
    parser.set_defaults(run=_run)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data", type=Path, metavar="FILE", help="JSON lines of yours (docs/tune.md)"
    )
    group.add_argument("--tasks", default="", help="or built-in ones (uncomp eval list)")
    group.add_argument("--lengths", default="4096", help="of the tasks' prompts, tokens")
    group.add_argument("--task-data", metavar="FOLDER", help="data sets, where no hub is reached")
    group.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="OWNER/NAME@REVISION",
        help="read a hub data set at this revision",
    )
    group.add_argument(
        "--samples", type=int, help="per task and length, or rows at most (default: 60, or all)"
    )
    group.add_argument("--metric", default="contains", help="of rows that name none")
    group.add_argument("--max-tokens", type=int, default=64, help="of rows that do not say")
    group.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)


def _add_search(group: Any) -> None:
    group.add_argument(
        "--max-loss", type=float, required=True, metavar="POINTS", help="of 100, e.g. 1"
    )
    group.add_argument("--confidence", type=float, default=0.95, help="of each verdict")
    group.add_argument("--policies", default="adakv,uniform,entropy", help="names")
    group.add_argument("--poolings", default="4,2,8", help="how far scores reach, words")
    group.add_argument("--windows", default="32,8", help="last queries; the engine gets the widest")
    group.add_argument(
        "--keep",
        default="0.03125:0.84:20",
        metavar="LOW:HIGH:STEPS",
        help="keep ratios, spaced evenly in their logarithm (default: %(default)s)",
    )
    group.add_argument("--trials", type=int, default=32, help="different settings at most")
    group.add_argument("--parallel", type=int, default=4, help="settings that share each prompt")
    group.add_argument("--looks", type=int, default=5, help="at the data of a setting")
    group.add_argument("--seed", type=int, default=0, help="of the search, samples and their order")


def _add_tables(group: Any) -> None:
    group.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument("--speed-batch", type=int, default=8, help="requests at a time")
    group.add_argument("--speed-tokens", type=int, default=64, help="measured per request")
    group.add_argument("--speed-rounds", type=int, default=3, help="of full, own, own, full")
    group.add_argument("--user-tokens", type=int, help="of a user (default: the longest prompt)")
    group.add_argument(
        "--kv-memory", metavar="BYTES", help="e.g. 40GiB (default: the engine's own pool)"
    )


def _run(args: argparse.Namespace) -> int:
    # Standard output is for the table; read by vLLM when it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

    def work(say: Callable[[str], None]) -> int:
        from uncomp.eval.tune.run import tune

        result = tune(options(args), args.out, say)
        print(result.markdown())
        return 0 if result.chosen is not None else 1

    return guarded("tune", work)


def options(args: argparse.Namespace) -> Any:
    """:class:`uncomp.eval.tune.options.Options` of a command line.

    Raises:
        ValueError: an argument that cannot be used.
    """
    from uncomp.eval.tune.options import Options
    from uncomp.eval.tune.space import Space
    from uncomp.eval.tune.users import parse_bytes

    return Options(
        model=args.model,
        revision=args.revision,
        data=args.data,
        tasks=tuple(words(args.tasks)),
        lengths=tuple(int(word) for word in words(args.lengths)),
        task_data=args.task_data,
        pins=tuple(args.pin),
        samples=args.samples,
        max_tokens=args.max_tokens,
        metric=args.metric,
        chat=args.chat,
        space=Space(
            tuple(words(args.policies)),
            tuple(int(word) for word in words(args.poolings)),
            tuple(int(word) for word in words(args.windows)),
            _keeps(args.keep),
        ),
        max_loss=args.max_loss,
        confidence=args.confidence,
        looks=args.looks,
        trials=args.trials,
        parallel=args.parallel,
        seed=args.seed,
        engine=named_values("--engine", args.engine),
        base_url=args.base_url,
        served_model=args.served_model,
        speed=args.speed,
        speed_batch=args.speed_batch,
        speed_tokens=args.speed_tokens,
        speed_rounds=args.speed_rounds,
        user_tokens=args.user_tokens,
        kv_memory=None if args.kv_memory is None else parse_bytes(args.kv_memory),
    )


def _keeps(text: str) -> tuple[float, ...]:
    from uncomp.eval.tune.space import keep_grid

    try:
        low, high, steps = text.split(":")
        values = float(low), float(high), int(steps)
    except ValueError as error:
        raise ValueError(f"--keep {text!r}: must be LOW:HIGH:STEPS, e.g. 0.05:0.8:16") from error
    return keep_grid(*values)
