"""`uncomp inspect FILE`: what a calibration file says about the heads of a model."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from uncomp.config import MEASURES, SOURCES, UncompConfig

if TYPE_CHECKING:
    from uncomp.calibration.file import Calibration
    from uncomp.calibration.plan import HeadPlan


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand; `run` becomes its action."""
    parser = subparsers.add_parser(
        "inspect",
        help="show a calibration file: importance, entropies and budgets of the heads, stages",
        description="Prints a table to stderr, the same as JSON to stdout, and draws it with "
        "--png. The budgets are what --kv-shares calibrated and the entropy policy deal for one "
        "prompt.",
    )
    parser.add_argument("file", metavar="FILE", help="file of `uncomp calibrate`")
    parser.add_argument("--png", metavar="OUT", help="also draw heat maps into this file")
    choices = {
        "source": (SOURCES, "whose entropy"),
        "measure": (MEASURES, "which entropy"),
    }
    for name, (allowed, text) in choices.items():
        default = getattr(UncompConfig, name)
        parser.add_argument(
            f"--{name}", choices=allowed, default=default, help=f"{text} (default: {default})"
        )
    numbers: dict[str, tuple[str, float, str]] = {
        "groups": ("M", UncompConfig.groups, "head groups per layer, at most the KV heads"),
        "ratio": ("R", UncompConfig.ratio, "share of the top group over the bottom group"),
        "keep": ("RATIO", 0.25, "keep ratio in (0, 1]"),
        "tokens": ("N", 4096, "length of the prompt"),
        "block-size": ("B", 16, "tokens per KV block"),
    }
    for name, (metavar, value, text) in numbers.items():
        parser.add_argument(
            f"--{name}", metavar=metavar, type=type(value), default=value,
            help=f"{text} (default: {value:g})",
        )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print and draw; 0, or 1 with the reason on stderr when the file or an option is bad."""
    from uncomp.calibration.file import CalibrationError, load
    from uncomp.calibration.plan import plan_heads, plan_shared, stage_starts

    try:
        calibration = load(args.file)
        plan = plan_heads(
            calibration,
            source=args.source, measure=args.measure, groups=args.groups, ratio=args.ratio,
            keep=args.keep, tokens=args.tokens, block_size=args.block_size,
        )  # fmt: skip
        shared = plan_shared(
            calibration, keep=args.keep, tokens=args.tokens, block_size=args.block_size
        )
        if args.png:
            _draw(args, calibration, plan, shared)
    except CalibrationError as error:
        print(f"uncomp inspect: {error}", file=sys.stderr)
        return 1
    starts = stage_starts(calibration)
    print(_table(args, calibration, plan, shared), file=sys.stderr)
    print(f"Stages of --prefill-keep begin at layers {[0, *starts]}", file=sys.stderr)
    rest = {"kept_tokens_shared": shared, "prefill_stages": starts}
    print(json.dumps({**_summary(args, calibration, plan), **rest}))
    return 0


def _summary(
    args: argparse.Namespace, calibration: "Calibration", plan: "HeadPlan"
) -> dict[str, object]:
    facts = ("model", "config_hash", "num_layers", "num_kv_heads", "head_dim", "truncation",
             "unit_norm", "samples", "tokens_per_sample", "created")  # fmt: skip
    options = ("source", "measure", "groups", "ratio", "keep", "tokens", "block_size")
    return {
        **{name: getattr(calibration, name) for name in facts},
        "text": [record["name"] for record in calibration.text],
        "settings": {name: getattr(args, name) for name in options},
        "entropy": plan.entropy,
        "entropy_std": calibration.entropy[args.source][args.measure]["std"],
        "group": plan.groups,
        "kept_tokens": plan.tokens,
        "png": args.png,
    }


def _table(
    args: argparse.Namespace,
    calibration: "Calibration",
    plan: "HeadPlan",
    shared: "list[list[int]] | None",
) -> str:
    std = calibration.entropy[args.source][args.measure]["std"]
    lines = [
        f"{calibration.model}: {calibration.num_layers} layers, {calibration.num_kv_heads} KV "
        f"heads, head size {calibration.head_dim}; {calibration.samples} samples of "
        f"{calibration.tokens_per_sample} tokens",
        f"Each head: {args.measure} entropy of the {args.source}, group, tokens kept of "
        f"{args.tokens} at keep ratio {args.keep:g}",
        "layer  "
        + "".join(f"{f'KV head {head}':<19}" for head in range(calibration.num_kv_heads))
        + "largest std over samples   --kv-shares calibrated keeps",
    ]
    for layer, entropies in enumerate(plan.entropy):
        cells = [
            f"{entropy:.3f} g{plan.groups[layer][head]:<2}{plan.tokens[layer][head]:>6}    "
            for head, entropy in enumerate(entropies)
        ]
        kept = "not in this file" if shared is None else " ".join(f"{n:>5}" for n in shared[layer])
        lines.append(f"{layer:>5}  " + "".join(cells) + f"{max(std[layer]):<27.3f}{kept}")
    return "\n".join(lines)


def _draw(
    args: argparse.Namespace,
    calibration: "Calibration",
    plan: "HeadPlan",
    shared: "list[list[int]] | None",
) -> None:
    from uncomp.calibration.draw import Panel, draw

    top = min(args.groups, calibration.num_kv_heads) - 1
    panels = [
        Panel(
            f"{args.measure.capitalize()} entropy of the {args.source}",
            "entropy / ln d", plan.entropy, "viridis", "{:.2f}",
        ),
        Panel(
            f"Group within the layer (0 = lowest of {top + 1})",
            "group", plan.groups, "YlGnBu", "{:.0f}", whole=True, top=top,
        ),
        Panel(
            f"Tokens kept of {args.tokens} (keep ratio {args.keep:g}, ratio {args.ratio:g})",
            "tokens", plan.tokens, "BuPu", "{:.0f}", origin=0.0,
        ),
    ]  # fmt: skip
    if shared is not None:
        title = f"The same where all layers share (keep ratio {args.keep:g})"
        panels.append(Panel(title, "tokens", shared, "BuPu", "{:.0f}", origin=0.0))
    samples, length = calibration.samples, calibration.tokens_per_sample
    title = f"{calibration.model}: its heads, {samples} samples of {length} tokens"
    draw(args.png, title, panels)
