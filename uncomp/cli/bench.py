"""`uncomp bench serve|cpu|gpu`: the benchmarks of :mod:`uncomp.eval.bench`."""

import argparse
import sys

BENCHES = {
    "serve": "servers with a full and with a compressed cache, under HTTP load",
    "cpu": "throughput, memory and overhead on the CPU engine",
    "gpu": "kernels and engine on a GPU",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """List the subcommand in the help; :func:`run` hands its arguments on."""
    subparsers.add_parser("bench", help=f"measure: {', '.join(BENCHES)}")


def run(argv: list[str]) -> int:
    """Run a benchmark; 2 if there is none of that name."""
    if not argv or argv[0] not in BENCHES:
        wanted = bool(argv) and argv[0] in ("-h", "--help")
        lines = ["usage: uncomp bench NAME [...]   (each has its own --help)", ""]
        lines += [f"  {name:<8}{about}" for name, about in BENCHES.items()]
        print("\n".join(lines), file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    if argv[0] == "serve":
        from uncomp.eval.bench import serve_main

        return serve_main.main(argv[1:])
    from uncomp.eval.bench import __main__

    return __main__.main(argv)
