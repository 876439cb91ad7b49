"""``uncomp bench serve``: its arguments, and what becomes of them."""

from __future__ import annotations

import argparse
import hashlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uncomp.cli import settings
from uncomp.cli.server import ServerError
from uncomp.eval.bench import rows as rows_
from uncomp.eval.bench import serve_plan, serve_trace
from uncomp.eval.bench.serve_clock import Clock, described
from uncomp.eval.bench.serve_plan import SHAPES, Load, Plan

_EPILOG = """What follows `--` goes to both servers as arguments of `vllm serve`.
shapes (prompt + answer tokens):
"""


def main(argv: list[str]) -> int:
    """Measure, or print the plan.

    Returns:
        0: done, or stopped after --sessions; 1: a request, a server or the client failed; 2: the
        arguments or the name are not usable.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    servers = argv[at + 1 :]
    args = _parser().parse_args(settings.normalized(argv[:at]))
    try:
        plan, trace = _plan(args)
        kv = {} if args.full_url else settings.merge(args, {})
        if kv or not args.full_url:
            settings.validate(kv)
        _check(args, servers)
    except (ValueError, OSError) as error:
        print(f"uncomp bench serve: error: {error}", file=sys.stderr)
        return 2
    clock = Clock(plan, args.expect_prefill, args.expect_decode, args.expect_start)
    if args.dry_run:
        print(f"{_traffic(plan, args)}; {_labels(kv)['compressed']} against full")
        print(described(plan, clock, not args.full_url))
        return 0
    # A default SIGTERM would leave the server running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(args, plan, trace, kv, servers, clock)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(
    args: argparse.Namespace,
    plan: Plan,
    trace: list[serve_trace.Arrival],
    kv: dict[str, Any],
    server_arguments: list[str],
    clock: Clock,
) -> int:
    from uncomp.eval.bench.serve import Bench
    from uncomp.eval.bench.serve_client import ClientError, Traffic
    from uncomp.eval.bench.serve_servers import Servers
    from uncomp.eval.bench.serve_store import Store, Taken

    urls = {"full": args.full_url, "compressed": args.compressed_url} if args.full_url else None
    model = args.model or ("" if urls else _demo_model())
    servers = Servers(model, kv, tuple(server_arguments), args.pool_bytes, urls, args.start_timeout)
    traffic = Traffic(plan, model, args.tokenizer or "", args.seed, tuple(trace))
    store = Store(args.results, args.name, _identity(args, plan, kv, server_arguments, model))
    bench = Bench(servers, traffic, store, clock, args.interval, args.load_timeout, _say)
    try:
        store.claim(args.force)
        complete = bench.run(args.sessions)
        results = store.results(plan.sessions())
    except Taken as error:
        print(f"uncomp bench serve: error: {error}", file=sys.stderr)
        return 2
    except (ServerError, ClientError, ValueError, OSError) as error:
        print(f"uncomp bench serve: {error}", file=sys.stderr)
        return 1
    if not complete:
        _say(f"stopped after --sessions {args.sessions}: the same command goes on")
        return 0
    found, table = store.publish(results, _traffic(plan, args), _labels(kv))
    print(table)
    _say(f"written: {store.output('.csv')}, .md and .json")
    return 1 if rows_.missed(found) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uncomp bench serve",
        usage="uncomp bench serve [MODEL] --kv-keep RATIO --pool-bytes N --concurrency 1,4 [...] "
        "[-- `vllm serve` arguments]",
        description="Throughput, latency and KV memory of vLLM servers with a full and with a "
        "compressed cache, under vLLM's own benchmark client: same requests, same pool, servers "
        "in the order A B B A.",
        epilog=_EPILOG + "\n".join(f"  {s}: {s.about}" for s in SHAPES.values()),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="checkpoint or hub name (default: demo model)")
    settings.add_flags(parser)
    load = parser.add_argument_group("load, any of these together").add_argument
    load("--concurrency", type=_numbers, default=(), metavar="N,N", help="requests in flight")
    load("--rate", type=_numbers, default=(), metavar="X,X", help="requests/s, Poisson arrivals")
    load("--trace", type=Path, metavar="FILE", help="recorded requests: docs/bench.md")
    load("--trace-speed", type=_numbers, default=(1.0,), metavar="X,X", help="1 = as recorded")
    load("--trace-unit", choices=list(serve_trace.UNITS), default="s", help="of its arrivals")
    load("--trace-block", type=int, default=512, metavar="N", help="tokens per hash id")
    _add_shape(parser.add_argument_group("requests").add_argument)
    _add_servers(parser.add_argument_group("servers").add_argument)
    _add_output(parser.add_argument_group("run and results").add_argument)
    return parser


def _add_shape(add: Callable[..., Any]) -> None:
    add("--shape", choices=list(SHAPES), default="long-prompt", help="default: long-prompt")
    add("--prompt-tokens", type=int, metavar="N", help="of the whole prompt")
    add("--output-tokens", type=int, metavar="N", help="of every answer")
    add("--prefix-tokens", type=int, metavar="N", help="of them shared")
    add("--prefixes", type=int, metavar="N", help="different shared beginnings")
    add("--requests", type=int, metavar="N", help="per load (default: 4 per request in flight, or "
        "one minute of arrivals, at least 8; a trace: all)")  # fmt: skip
    add("--warm-up", type=int, default=2, metavar="N", help="requests before the first load")
    add("--seed", type=int, default=0, help="of prompts and arrivals, the same for both arms")


def _add_servers(add: Callable[..., Any]) -> None:
    add("--pool-bytes", type=int, metavar="N", help="KV cache of either server")
    add("--full-url", metavar="URL", help="use a server that runs (with --compressed-url)")
    add("--compressed-url", metavar="URL", help="the same for the compressed arm")
    add("--tokenizer", metavar="NAME", help="for the client (default: the model's)")
    add("--start-timeout", type=float, default=1200.0, metavar="S", help="for a server to be ready")
    add("--load-timeout", type=float, default=7200.0, metavar="S", help="for one load")


def _add_output(add: Callable[..., Any]) -> None:
    add("--rounds", type=int, default=2, metavar="N", help="servers per arm (default: 2)")
    add("--sessions", type=int, metavar="N", help="stop after N servers; run again to go on")
    add("--interval", type=float, default=0.5, metavar="S", help="between readings of /metrics")
    add("--name", default="serve", help="of the result files (default: serve)")
    add("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--force", action="store_true", help="overwrite another run of that name")
    add("--dry-run", action="store_true", help="print the plan and an estimate")
    add("--expect-prefill", type=float, default=2000.0, metavar="X", help="tokens/s, for estimates")
    add("--expect-decode", type=float, default=30.0, metavar="X", help="tokens/s of one request")
    add("--expect-start", type=float, default=60.0, metavar="S", help="until a server is ready")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers, e.g. 1,4,8") from error


def _plan(args: argparse.Namespace) -> tuple[Plan, list[serve_trace.Arrival]]:
    given = {
        "prompt": args.prompt_tokens,
        "output": args.output_tokens,
        "prefix": args.prefix_tokens,
        "prefixes": args.prefixes,
    }
    base = SHAPES[args.shape].__dict__
    shape = serve_plan.Shape(**{**base, **{k: v for k, v in given.items() if v is not None}})
    loads = [Load("concurrency", x) for x in args.concurrency]
    loads += [Load("rate", x) for x in args.rate]
    trace: list[serve_trace.Arrival] = []
    if args.trace is not None:
        trace = serve_trace.read(args.trace, args.trace_unit, args.trace_block, args.requests)
        loads += [Load("trace", x) for x in args.trace_speed]
    # Of a prompt given as text the length is guessed, for estimates only.
    tokens = sum(r.prompt_tokens or len(r.prompt) // 4 for r in trace)
    plan = Plan(
        shape,
        tuple(loads),
        args.rounds,
        args.requests,
        args.warm_up,
        len(trace),
        (tokens, sum(r.output_tokens for r in trace)),
        trace[-1].seconds if trace else 0.0,
    )
    return plan, trace


def _check(args: argparse.Namespace, server_arguments: list[str]) -> None:
    if bool(args.full_url) != bool(args.compressed_url):
        raise ValueError("give both --full-url and --compressed-url, or neither")
    if args.full_url and server_arguments:
        raise ValueError(f"{server_arguments} after -- are for servers that are started here")
    if not args.full_url and args.pool_bytes is None:
        raise ValueError(
            "give --pool-bytes: the KV cache of either server (as vLLM's --kv-cache-memory-bytes); "
            "without it the two could have different memory"
        )
    if args.interval <= 0 or (args.sessions is not None and args.sessions < 1):
        raise ValueError("--interval must be above 0 and --sessions at least 1")


def _identity(
    args: argparse.Namespace, plan: Plan, kv: dict[str, Any], servers: list[str], model: str
) -> dict[str, Any]:
    """What must be equal for results to belong to the same run."""
    trace = args.trace and hashlib.sha256(args.trace.read_bytes()).hexdigest()
    facts = {k: v for k, v in rows_.machine().items() if k not in ("date", "commit")}
    return {
        **serve_plan.fingerprint(plan),
        "model": Path(model).name if Path(model).exists() else model,
        "kv": kv,
        "server_arguments": servers,
        "pool_bytes": args.pool_bytes,
        "urls": [args.full_url, args.compressed_url],
        "seed": args.seed,
        "trace": trace,
        "interval": args.interval,
        "machine": facts,
    }


def _labels(kv: dict[str, Any]) -> dict[str, str]:
    label = ", ".join(f"{name} {value}" for name, value in kv.items())
    return {"full": "full", "compressed": f"compressed {label}".strip()}


def _traffic(plan: Plan, args: argparse.Namespace) -> str:
    kinds = [str(plan.shape)] if any(x.mode != "trace" for x in plan.loads) else []
    return ", ".join(kinds + ([f"trace {args.trace.name}"] if args.trace else []))


def _demo_model() -> str:
    from uncomp.demo_model import demo_model_path

    return str(demo_model_path())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
