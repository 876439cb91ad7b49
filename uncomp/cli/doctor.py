"""`uncomp doctor`: is compression really active here, and does it do what it says?"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uncomp.cli import findings, settings
from uncomp.cli.findings import FAIL, NOTE, Fact

_GENERATE = 24
#: for the demo model only, so that three engine starts take a minute and little memory
_SMALL = ["--max-model-len", "4096", "--kv-cache-memory-bytes", "300000000", "--enforce-eager"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """List the subcommand in the help; :func:`run` parses its arguments itself."""
    subparsers.add_parser("doctor", help="start the engine, compress a probe, report fact by fact")


def run(argv: list[str]) -> int:
    """Report; 0 if no fact is a FAIL, 1 if one is, 2 for settings that are not usable."""
    if "-h" in argv or "--help" in argv:
        print(f"{_parser().format_help()}\n{settings.choices_help()}")
        return 0
    model, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    args, vllm_flags = _parser().parse_known_args(settings.normalized(rest))
    try:
        merged = settings.merge(args, {})
        if merged.get("keep") is None and merged.get("budget") is None:
            merged["keep"] = 0.25
        config = settings.validate(merged)
    except settings.SettingsError as error:
        print(f"uncomp doctor: error: {error}", file=sys.stderr)
        return 2
    report = Report(quiet=args.json)
    if findings.installation(report.add):
        arguments = _model(model, vllm_flags)
        _probe(report, arguments, merged, config)
    if args.json:
        print(json.dumps({"ok": report.ok, "facts": [asdict(fact) for fact in report.facts]}))
    else:
        print("everything is in order" if report.ok else "FAIL: see above")
    return 0 if report.ok else 1


class Report:
    """Facts as they are found; printed at once unless `quiet` (then to stderr)."""

    def __init__(self, quiet: bool) -> None:
        self.facts: list[Fact] = []
        self._file = sys.stderr if quiet else sys.stdout

    def add(self, status: str, name: str, text: str) -> None:
        self.facts.append(Fact(status, name, text))
        print(f"{status:<5} {name}: {text}", file=self._file, flush=True)

    @property
    def ok(self) -> bool:
        return all(fact.status != FAIL for fact in self.facts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uncomp doctor",
        usage="uncomp doctor [MODEL] [--json] [--kv-...] [any vLLM engine argument]",
        description="Starts the engine as a user would, three times: with compression, without, "
        "and moving every token but dropping none. Exit status 0: everything is in order. Without "
        "MODEL: the demo model. Without --kv-keep or --kv-budget: --kv-keep 0.25.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="facts as JSON on stdout")
    settings.add_flags(parser)
    return parser


def _model(model: str | None, flags: list[str]) -> list[str]:
    if model is not None:
        # Engines of other processes may run in another folder.
        folder = Path(model)
        return ["--model", str(folder.absolute()) if folder.is_dir() else model, *flags]
    from uncomp.demo_model import demo_model_path

    return ["--model", str(demo_model_path()), *_SMALL, *flags]


def _probe(report: Report, arguments: list[str], merged: dict[str, Any], config: Any) -> None:
    """The three engine runs, and what follows from them."""
    # The probe needs requests with a budget of their own, whatever clients are allowed.
    own = {**merged, "overrides": "allow", "min_keep": 0.0}
    squeeze: dict[str, Any] = {} if config.keep != 1.0 else {"kv_keep": 0.25}
    # Pruning is a request of its own: one that drops nothing is to equal stock vLLM.
    unpruned = {} if config.prefill_keep is None else {"kv_prefill_keep": 1}
    squeeze |= unpruned
    asked = [{"kv_budget": 10**9, **unpruned}, squeeze]
    if unpruned:
        share = config.prefill_keep if config.prefill_keep < 1 else 0.5
        asked.append({"kv_budget": 10**9, "kv_prefill_keep": share})
    plugin = _engine(arguments, own, tokens=0, extra=asked)
    if "error" in plugin:
        report.add(FAIL, "engine with compression", plugin["error"])
        return
    findings.processes(plugin, report.add)
    findings.features(plugin, report.add)
    findings.accounting(plugin, config, squeeze, report.add)
    if unpruned:
        findings.pruning(plugin, config, share, report.add)
    same = [*arguments, "--block-size", str(plugin["block_size"])]
    stock = _engine(same, None, plugin["tokens"], [{}])
    if "error" in stock:
        report.add(FAIL, "engine without compression", stock["error"])
        return
    name = "output with a budget larger than the prompt"
    findings.equal(name, stock["requests"][0], plugin["requests"][0], report.add)
    whole = {k: v for k, v in own.items() if k != "budget"} | {"relocate": True, "keep": 0.5}
    moved = _engine(same, whole, plugin["tokens"], [unpruned])
    name = "output with every token moved and none dropped"
    if "error" in moved:
        report.add(FAIL, name, moved["error"])
    elif moved["requests"][0]["counted"]["compactions"] < 1:
        report.add(FAIL, name, "no token was moved")
    else:
        findings.equal(name, stock["requests"][0], moved["requests"][0], report.add)
    report.add(
        NOTE, "refused at start-up, with compression", f"{len(plugin['conflicts'])} features"
    )
    for feature, why, remedy in plugin["conflicts"]:
        report.add(NOTE, f"refused: {feature}", f"{why}; {remedy}")


def _engine(
    arguments: list[str], own: Mapping[str, Any] | None, tokens: int, extra: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `uncomp.engine.probe` saw; ``own`` is ``None`` for the unmodified engine."""
    environment = dict(os.environ)
    if own is None:
        environment["UNCOMP_DISABLE"] = "1"
    else:
        arguments = [*arguments, "--additional-config", json.dumps({"uncomp": own})]
    task = {"arguments": arguments, "tokens": tokens, "generate": _GENERATE, "extra": extra}
    with tempfile.TemporaryDirectory(prefix="uncomp-doctor-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        result, log = folder / "result.json", folder / "log"
        # In the empty folder: no package of the user's folder is imported by accident.
        command = [sys.executable, "-m", "uncomp.engine.probe", "task.json", "result.json"]
        with open(log, "wb") as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, cwd=folder, env=environment
            )
        seen = (
            json.loads(result.read_text(encoding="utf-8"))
            if result.is_file()
            else {"error": f"the process ended with status {done.returncode}"}
        )
        if "error" in seen:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            seen["error"] += findings.cause(lines)
        return seen
