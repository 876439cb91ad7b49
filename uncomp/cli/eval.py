"""`uncomp eval`: what compression costs in accuracy, measured on the live engine."""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ABOUT = """Accuracy of compressed caches against the full cache, on the real engine.

  uncomp eval list                              tasks and methods
  uncomp eval run MODEL --tasks ruler ...       everything; a killed run continues where it was
  uncomp eval prepare MODEL ...                 only the samples
  uncomp eval predict|score|report FOLDER       one stage of a run that has begun
  uncomp eval compare FOLDER ... --method NAME  one method against each of the others"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "eval",
        help="accuracy of compressed caches on long-context tasks",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=lambda _: _usage(parser))
    commands = parser.add_subparsers(metavar="COMMAND")
    commands.add_parser("list", help="tasks and methods").set_defaults(run=_list)
    for name in ("run", "prepare"):
        command = commands.add_parser(
            name,
            help="all stages" if name == "run" else "only make the samples",
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_plan(command)
        command.set_defaults(run=_start, stages=_STAGES[name])
    for name in ("predict", "score", "report"):
        command = commands.add_parser(name, help=f"the {name} stage of a run")
        command.add_argument("folder", type=Path)
        command.set_defaults(run=_continue, stages=(name,))
        if name == "report":
            command.add_argument(
                "--serving",
                type=Path,
                nargs="+",
                default=[],
                metavar="FILE",
                help="NAME.json of `uncomp bench serve`, shown beside the scores",
            )

    command = commands.add_parser(
        "compare", help="one method against each of the others, over one run or several"
    )
    command.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="scored runs")
    command.add_argument("--method", default="uncomp")
    command.add_argument("--csv", action="store_true", help="rows instead of Markdown tables")
    command.set_defaults(run=_compare)


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


_STAGES = {"run": ("prepare", "predict", "score", "report"), "prepare": ("prepare",)}


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub name; with --base-url: its tokenizer")
    parser.add_argument("--revision", help="of the hub model")
    parser.add_argument("--tasks", default="ruler", help="names or families, comma-separated")
    parser.add_argument("--lengths", default="4096", help="prompt lengths in tokens")
    parser.add_argument("--samples", type=int, default=20, help="per task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default="uncomp,snapkv,adakv,streaming,random")
    parser.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help='a method of your own: wide=\'{"policy": "entropy", "window": 32}\'',
    )
    parser.add_argument("--keep", default="0.5,0.25,0.125,0.0625", help="keep ratios")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--query-agnostic",
        action="store_true",
        help="compress when the context is read, before the question is",
    )
    parser.add_argument("--data", help="folder with data sets, where no hub can be reached")
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="OWNER/NAME@REVISION",
        help="read a hub data set at this revision",
    )
    parser.add_argument(
        "--accept-data",
        action="append",
        default=[],
        metavar="SHA256",
        help="take a packaged data file that is not the pinned one",
    )
    parser.add_argument("--calibration", help="file of `uncomp calibrate`")
    parser.add_argument("--base-url", help="of a running server, e.g. http://localhost:8000/v1")
    parser.add_argument("--served-model", help="name on that server")
    parser.add_argument("--top-logprobs", type=int, default=20, help="for likelihood tasks")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="argument of vllm.LLM, e.g. enforce_eager=true",
    )
    parser.add_argument("--out", type=Path, help="folder (default: uncomp-eval/ and a name)")


def _start(args: argparse.Namespace) -> int:
    return _guarded(lambda: _new_run(args), args.stages)


def _continue(args: argparse.Namespace) -> int:
    def opened() -> Any:
        from uncomp.eval.run.store import Store

        return Store(args.folder)

    return _guarded(opened, args.stages, getattr(args, "serving", ()))


def _compare(args: argparse.Namespace) -> int:
    def work(say: Callable[[str], None]) -> int:
        from uncomp.eval.report.compare import as_csv, compare, markdown
        from uncomp.eval.run.store import Store

        lines = compare([Store(folder).scores() for folder in args.folders], args.method)
        print((as_csv if args.csv else markdown)(lines), end="")
        return 0

    return guarded("eval", work)


def _guarded(opened: Any, stages: tuple[str, ...], serving: Sequence[Path] = ()) -> int:
    def work(say: Callable[[str], None]) -> int:
        from uncomp.eval.run.pipeline import run

        store = opened()
        say(f"run folder {store.folder}")
        run(store, stages, say, serving=serving)
        return 0

    return guarded("eval", work)


def guarded(command: str, work: Callable[[Callable[[str], None]], int]) -> int:
    """Run a resumable command; what the user can mend becomes one line and status 2, an engine or
    data that failed 1.

    Args:
        command: name in the lines on stderr.
        work: gets what prints such a line; returns the exit status.
    """
    from uncomp.eval.engines.base import EngineError
    from uncomp.eval.tasks.base import DataError

    def say(text: str) -> None:
        print(f"uncomp {command}: {text}", file=sys.stderr, flush=True)

    try:
        with _unwinding():
            return work(say)
    except (EngineError, DataError) as error:
        say(f"error: {error}")
        return 1
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130


@contextmanager
def _unwinding() -> Iterator[None]:
    """Let SIGTERM end this program like Ctrl-C, or the engine's processes would outlive it."""
    if threading.current_thread() is not threading.main_thread():  # cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _new_run(args: argparse.Namespace) -> Any:
    from uncomp.eval.run.pipeline import check
    from uncomp.eval.run.plan import Plan
    from uncomp.eval.run.store import Store

    own = named_values("--method", args.method)
    plan = Plan(
        model=args.model,
        revision=args.revision,
        tasks=tuple(words(args.tasks)),
        lengths=tuple(int(word) for word in words(args.lengths)),
        samples=args.samples,
        seed=args.seed,
        methods=tuple(dict.fromkeys([*words(args.methods), *own])),
        custom=own,
        keeps=tuple(float(word) for word in words(args.keep)),
        chat=args.chat,
        data=args.data,
        pins=tuple(args.pin),
        accept=tuple(args.accept_data),
        calibration=args.calibration,
        engine=named_values("--engine", args.engine),
        base_url=args.base_url,
        served_model=args.served_model,
        top_logprobs=args.top_logprobs,
        query_agnostic=args.query_agnostic,
    )
    check(plan)
    return Store.create(args.out or Path("uncomp-eval", plan.name()), plan)


def words(text: str) -> list[str]:
    """The parts of a comma-separated argument."""
    return [word.strip() for word in text.split(",") if word.strip()]


def named_values(flag: str, given: list[str]) -> dict[str, Any]:
    """What a repeated ``NAME=JSON`` argument says.

    Raises:
        ValueError: one is not of that form.
    """
    pairs = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        try:
            pairs[name] = json.loads(value) if equals else None
        except json.JSONDecodeError:
            pairs[name] = value  # a plain word, as in kv_cache_dtype=fp8
        if not equals or not name:
            raise ValueError(f"{flag} {pair!r}: must be NAME=JSON")
    return pairs


def _list(args: argparse.Namespace) -> int:
    from uncomp.eval.methods import METHODS
    from uncomp.eval.tasks.registry import TASKS

    print("tasks")
    for task in TASKS.values():
        print(f"  {task.name:32} {task.about}")
    print("methods")
    for method in METHODS.values():
        print(f"  {method.name:32} {method.about}")
    return 0
