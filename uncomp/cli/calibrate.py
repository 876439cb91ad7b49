"""`uncomp calibrate MODEL -o FILE`: measure the head entropies of a model once."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

# Below this the ranking of heads depends on the sample more than on the head (raw entropy most).
FEW_TOKENS = 1024


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand; `run` becomes its action."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure the head entropies of a model and write a calibration file",
        description="Runs real text through a Hugging Face model and writes, for every KV head, "
        "the entropy of its queries and keys. Done once per model; prints a summary as JSON.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hugging Face id")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="file to write")
    parser.add_argument("--samples", type=int, default=16, help="windows of text (default: 16)")
    parser.add_argument(
        "--tokens", type=int, default=2048, help="tokens per window (default: 2048)"
    )
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", default=[],
        help="UTF-8 text files, used in turn (default: packaged public-domain text)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="choice of windows (default: 0)")
    parser.add_argument(
        "--unit-norm", action=argparse.BooleanOptionalAction, default=True,
        help="scale every centred token to unit length, as published (default: yes); "
        "--no-unit-norm is what the online entropy uses",
    )  # fmt: skip
    parser.add_argument(
        "--truncation", metavar="K", type=int, default=None,
        help="leading eigenvalues in the raw and renormalized entropy (default: head size / 4)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=None, help="torch device (default: cuda if there is one, else cpu)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate and save; 0 when the file was written, 1 with the reason on stderr if not."""
    from uncomp.calibration.file import CalibrationError

    try:
        summary = _calibrate(args)
    except CalibrationError as error:
        print(f"uncomp calibrate: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=1))
    return 0


def _calibrate(args: argparse.Namespace) -> dict[str, object]:
    from uncomp.calibration.file import CalibrationError

    try:
        import torch
        from tqdm import tqdm

        from uncomp.calibration.collect import calibrate, load_model
        from uncomp.calibration.text import read_texts
    except ImportError as error:
        raise CalibrationError(f"{error}: pip install 'uncomp[calibrate]'") from error

    if args.tokens < FEW_TOKENS:
        print(
            f"uncomp calibrate: {args.tokens} tokens per window are few; below {FEW_TOKENS} "
            "the ranking of heads is unreliable",
            file=sys.stderr,
        )
    # Known now, not after minutes of work.
    if not Path(args.output).absolute().parent.is_dir() or Path(args.output).is_dir():
        raise CalibrationError(f"cannot write {args.output}: give a file in an existing folder")
    texts = read_texts(args.text)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(args.model, device)

    def progress(samples: Iterable[list[int]]) -> Iterable[list[int]]:
        return tqdm(samples, desc="calibrating", unit="sample", file=sys.stderr)

    calibration = calibrate(
        model, tokenizer, args.model, texts,
        samples=args.samples, tokens=args.tokens, seed=args.seed,
        unit_norm=args.unit_norm, truncation=args.truncation, progress=progress,
    )  # fmt: skip
    calibration.save(args.output)
    return {
        "file": args.output,
        "model": calibration.model,
        "config_hash": calibration.config_hash,
        "layers": calibration.num_layers,
        "kv_heads": calibration.num_kv_heads,
        "head_dim": calibration.head_dim,
        "truncation": calibration.truncation,
        "unit_norm": calibration.unit_norm,
        "samples": calibration.samples,
        "tokens_per_sample": calibration.tokens_per_sample,
        "text": [record["name"] for record in calibration.text],
    }
