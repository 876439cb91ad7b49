"""The `uncomp` command. One module per subcommand; none imports torch or vllm at the top."""

import argparse
import sys

import uncomp
from uncomp.cli import bench, calibrate, demo, doctor, eval, inspect, serve, tune

#: Their arguments are mostly vLLM's and must reach it untouched, so argparse does not see them.
PASS_THROUGH = {"serve": serve.run, "bench": bench.run, "doctor": doctor.run}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments after the program's name (default: the process's own).

    Returns:
        Exit status: 0 for success, 1 for a negative verdict or a failure, 2 for wrong usage.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in PASS_THROUGH:
        return PASS_THROUGH[argv[0]](argv[1:])
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uncomp",
        description="KV-cache compression for stock vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"uncomp {uncomp.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (serve, doctor, demo, eval, tune, bench, calibrate, inspect):
        module.add_parser(subparsers)
    return parser
