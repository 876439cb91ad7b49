"""`uncomp serve MODEL --kv-keep 0.25 [...]`: vLLM's own server with compression on."""

import argparse
import json
import sys
from importlib import metadata
from typing import Any

from uncomp import envs
from uncomp.cli import settings
from uncomp.cli.distribution import distribution_found
from uncomp.cli.settings import SettingsError

_ADDITIONAL = "--additional-config"
_EPILOG = """Every other argument goes to `vllm serve` untouched: see `vllm serve --help`.
UNCOMP_DISABLE=1 in the environment serves without compression, whatever the flags say.
A request can have its own settings (vllm_xargs in the OpenAI API): kv_compress, kv_keep, kv_budget,
kv_protect, kv_policy, kv_settings, kv_compact_at, kv_report."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """List the subcommand in the help; :func:`run` parses its arguments itself."""
    subparsers.add_parser("serve", help="vLLM's OpenAI server with compression on")


def run(argv: list[str]) -> int:
    """Serve until stopped; 2 with the reason on stderr if the settings are not usable."""
    if "-h" in argv or "--help" in argv:
        print(_help())
        return 0
    try:
        rest = vllm_arguments(argv)
        check_plugin()
    except ValueError as error:
        print(f"uncomp serve: error: {error}", file=sys.stderr)
        return 2
    return _vllm(["serve", *rest])


def vllm_arguments(argv: list[str]) -> list[str]:
    """What `vllm serve` is started with: our flags become an entry of ``--additional-config``.

    Raises:
        SettingsError: settings that are missing or not valid.
    """
    argv = settings.normalized(argv)
    if envs.disabled():
        # Values are not looked at: the kill switch must work whatever the flags say.
        print("uncomp: UNCOMP_DISABLE is set, serving without compression", file=sys.stderr)
        return _strip(argv)
    args, rest = _parser().parse_known_args(argv)
    dotted = [a for a in rest if a.replace("_", "-").startswith(f"{_ADDITIONAL}.")]
    if any(a.split(".")[1].split("=")[0] == "uncomp" for a in dotted):
        raise SettingsError(f"{dotted[0]}: use the --kv-... flags here (see --help)")
    additional = _additional(args.additional_config, rest)
    merged = settings.merge(args, additional.pop("uncomp", {}))
    settings.validate(merged)
    if dotted:  # vLLM would let these replace the JSON form
        entries = {"uncomp": merged, **additional}
        return [*rest, *(f"{_ADDITIONAL}.{k}={json.dumps(v)}" for k, v in entries.items())]
    return [*rest, _ADDITIONAL, json.dumps({**additional, "uncomp": merged})]


def check_plugin() -> None:
    """Make sure that vLLM will load the plugin; compression would silently stay off otherwise.

    Raises:
        SettingsError: it will not; the message says why.
    """
    if envs.disabled():
        return
    chosen = envs.vllm_plugins()
    if chosen is not None and "uncomp" not in chosen:
        raise SettingsError(
            f"VLLM_PLUGINS={','.join(chosen)} keeps vLLM from loading uncomp: add `uncomp` to it "
            f"or unset it"
        )
    if not any(e.name == "uncomp" for e in metadata.entry_points(group="vllm.general_plugins")):
        raise SettingsError(
            "the installed uncomp has no vLLM entry point: install it with pip (pip install uncomp)"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uncomp serve",
        usage="uncomp serve MODEL (--kv-keep RATIO | --kv-budget TOKENS) [--kv-...] "
        "[any `vllm serve` argument]",
        description="vLLM's OpenAI-compatible server with a compressed KV cache.",
        epilog=_EPILOG,
        add_help=False,
        allow_abbrev=False,  # --kv-c... belongs to vLLM (--kv-cache-dtype)
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings.add_flags(parser)
    parser.add_argument(_ADDITIONAL, "--additional_config", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def _help() -> str:
    return f"{_parser().format_help()}\n{settings.choices_help()}"


def _strip(argv: list[str]) -> list[str]:
    """`argv` without our flags and their values, whatever those are."""
    parser = _parser()
    kept, skip = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        ours = name.startswith(("--kv-", "--no-kv-", "--prefill-"))
        action = parser._option_string_actions.get(name) if ours else None
        if action is not None:
            skip = not equals and action.nargs != 0
        elif skip:
            skip = False
        else:
            kept.append(argument)
    return kept


def _additional(given: str | None, rest: list[str]) -> dict[str, Any]:
    """The user's own additional config: of the flag, else of vLLM's ``--config`` file."""
    if given is not None:
        try:
            additional = json.loads(given)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{_ADDITIONAL} {given!r} is not JSON: {error}") from error
    else:
        additional = {}
        for i, argument in enumerate(rest):
            name, equals, value = argument.partition("=")
            if name == "--config" and (equals or i + 1 < len(rest)):
                file = settings.read_yaml(value if equals else rest[i + 1])
                additional = file.get("additional-config", file.get("additional_config", {}))
                if isinstance(additional, str):
                    return _additional(additional, [])
    if not isinstance(additional, dict):
        raise SettingsError(f"{_ADDITIONAL} must be a JSON object, got {additional!r}")
    if not isinstance(additional.get("uncomp", {}), dict):
        raise SettingsError(
            f'{_ADDITIONAL}: "uncomp" must be an object like {{"keep": 0.25}}, got '
            f"{additional['uncomp']!r}"
        )
    return dict(additional)


def _vllm(argv: list[str]) -> int:
    """Run vLLM's command line in this process."""
    try:
        from vllm.entrypoints.cli.main import main
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        print(
            "uncomp serve: error: vLLM is not installed: pip install 'uncomp[vllm]' (GPU) or "
            "'uncomp[cpu]'",
            file=sys.stderr,
        )
        return 1
    sys.argv = ["vllm", *argv]
    try:
        with distribution_found():
            main()
    except ValueError as error:
        from uncomp.calibration.file import CalibrationError
        from uncomp.engine.conflicts import ConflictError

        if not isinstance(error, ConflictError | CalibrationError):
            raise
        print(f"uncomp serve: error: {error}", file=sys.stderr)
        return 2
    return 0
