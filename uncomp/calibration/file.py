"""The calibration file: head entropies of one model, JSON, made once offline and read by every run.

One file serves every setting: it holds mean and standard deviation over the text samples for both
sources (queries, keys) and all three measures (raw, renormalized, full).
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uncomp.config import MEASURES, SOURCES

if TYPE_CHECKING:
    import torch

    from uncomp.importance import Importance

FORMAT_VERSION = 1
STATISTICS = ("mean", "std")

Table = list[list[float]]  # [layers][KV heads]
Entropies = dict[str, dict[str, dict[str, Table]]]  # source -> measure -> statistic -> Table

# The file stays small and readable; the noise between samples is about 1e-2.
DECIMALS = 6

# A normalised entropy lies in [0, 1]; the margin admits rounding at 1.
ENTROPY_LIMIT = 1.0 + 1e-4


class CalibrationError(ValueError):
    """A calibration file, model or text that cannot be used; the message says what to do."""


def model_identity(hf_config: Any) -> dict[str, Any]:
    """The fields of a Hugging Face config that decide whether a calibration fits a model.

    Weights are not part of it: a fine-tune shares the identity of its base model, on purpose.
    RoPE is written the same way for transformers 4 (`rope_theta`, `rope_scaling`) and 5
    (`rope_parameters`).
    """
    get_text_config = getattr(hf_config, "get_text_config", None)
    text = get_text_config() if callable(get_text_config) else hf_config
    heads = int(text.num_attention_heads)
    return {
        "model_type": text.model_type,
        "num_layers": int(text.num_hidden_layers),
        "num_query_heads": heads,
        "num_kv_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        "hidden_size": int(text.hidden_size),
        "vocab_size": int(text.vocab_size),
        "rope": _rope_identity(text),
    }


def _rope_identity(text: Any) -> dict[str, Any]:
    parameters = dict(
        getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    )
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        return {kind: _flat_rope(value, text) for kind, value in sorted(parameters.items())}
    return _flat_rope(parameters, text)


def _flat_rope(parameters: Mapping[str, Any], text: Any) -> dict[str, Any]:
    rope = {key: value for key, value in parameters.items() if value is not None}
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    theta = rope.get("rope_theta", getattr(text, "rope_theta", None))
    if theta is not None:
        rope["rope_theta"] = float(theta)
    return dict(sorted(rope.items()))


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 (hex) of the identity fields in canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Calibration:
    """Head entropies of a model and everything needed to judge where they come from.

    `entropy[source][measure]["mean" | "std"][layer][kv_head]`: truncated matrix entropy (natural
    logarithm) divided by ln(head_dim), so in [0, 1]; mean and population standard deviation over
    `samples` texts. For source "queries" the value of a KV head is the mean over its query heads.
    `text` lists what was read: name and sha256 of each text.

    `importance` is None in older files, else {"keeps": keep ratios, "shares":
    [keeps][layer][kv_head], "samples", "tokens"}: what heads need of a cache that all layers share,
    see `uncomp.importance`.
    """

    model: str
    identity: dict[str, Any]
    config_hash: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    truncation: int
    unit_norm: bool
    samples: int
    tokens_per_sample: int
    seed: int
    text: list[dict[str, str]]
    versions: dict[str, str]
    created: str
    entropy: Entropies
    format_version: int = FORMAT_VERSION
    importance: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise CalibrationError naming the first field that is wrong."""
        _check_fields(self)
        for source in SOURCES:
            for measure in MEASURES:
                for statistic in STATISTICS:
                    _check_table(self, source, measure, statistic)
        if self.importance is not None:
            _check_importance(self, self.importance)

    def head_importance(self) -> "Importance":
        """What the heads need of a cache that all layers share.

        Raises:
            CalibrationError: the file is older than this measurement.
        """
        import torch

        from uncomp.importance import Importance

        if self.importance is None:
            raise CalibrationError(
                "holds no importance of heads, it was made by an older uncomp: calibrate again"
            )
        shares = torch.tensor(self.importance["shares"], dtype=torch.float64)
        return Importance(tuple(self.importance["keeps"]), shares)

    def scores(self, source: str, measure: str) -> "torch.Tensor":
        """Mean entropies [num_layers, num_kv_heads] float64 for a source and a measure."""
        import torch

        if source not in SOURCES or measure not in MEASURES:
            raise CalibrationError(
                f"no entropies for source {source!r}, measure {measure!r}: "
                f"choose a source from {SOURCES} and a measure from {MEASURES}"
            )
        return torch.tensor(self.entropy[source][measure]["mean"], dtype=torch.float64)

    def check_model(self, hf_config: Any) -> None:
        """Raise CalibrationError unless `hf_config` is the model this file was made for."""
        identity = model_identity(hf_config)
        if identity_hash(identity) == self.config_hash:
            return
        differing = [key for key in identity if identity[key] != self.identity.get(key)]
        given = {key: identity[key] for key in differing}
        made_for = {key: self.identity.get(key) for key in differing}
        raise CalibrationError(
            f"the calibration was made for {self.model!r} with {made_for}, "
            f"the model served has {given}: run `uncomp calibrate` on the served model"
        )

    def save(self, path: str | Path) -> None:
        """Write JSON, one table row per line; an existing file is replaced in one step."""
        path = Path(path)
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        # Lists of numbers go on one line. JSON strings hold no line break, so none is touched.
        text = re.sub(r"\[\n\s+([^\[\]{}\"]*?)\s+\]", _one_line, text)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CalibrationError(f"cannot write {path}: {error}") from error


def _one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", match[1]) + "]"


def load(path: str | Path) -> Calibration:
    """Read and validate a calibration file; raise CalibrationError with the path and the reason."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read calibration file {path}: {error}") from error
    try:
        content = json.loads(text, parse_constant=_reject_constant)
        return _from_json(content)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"calibration file {path} is not JSON: {error}") from error
    except CalibrationError as error:
        raise CalibrationError(f"calibration file {path}: {error}") from error


def _reject_constant(name: str) -> float:
    raise CalibrationError(f"contains {name}; every number must be finite: calibrate again")


def _from_json(content: Any) -> Calibration:
    if not isinstance(content, dict):
        raise CalibrationError(f"holds a JSON {type(content).__name__}, expected an object")
    # The version comes first: the fields of another version are not comparable.
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CalibrationError(
            f"has format version {version!r}, this uncomp reads {FORMAT_VERSION}: calibrate again"
        )
    names = {field.name for field in fields(Calibration)}
    missing = sorted(names - content.keys() - {"importance"})
    unknown = sorted(content.keys() - names)
    if missing or unknown:
        raise CalibrationError(f"missing fields {missing}, unknown fields {unknown}")
    return Calibration(**content)


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """isinstance, with bool not counting as a number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_fields(calibration: Calibration) -> None:
    kinds: dict[str, type] = {
        "model": str, "config_hash": str, "created": str, "identity": dict, "text": list,
        "versions": dict, "entropy": dict, "unit_norm": bool, "seed": int,
    }  # fmt: skip
    for name, kind in kinds.items():
        if not _is(getattr(calibration, name), kind):
            raise CalibrationError(
                f"field {name} is {getattr(calibration, name)!r}, expected {kind.__name__}"
            )
    counts = ("num_layers", "num_query_heads", "num_kv_heads", "head_dim", "truncation",
              "samples", "tokens_per_sample")  # fmt: skip
    for name in counts:
        value = getattr(calibration, name)
        if not _is(value, int) or value < 1:
            raise CalibrationError(f"field {name} is {value!r}, expected a positive integer")
    if calibration.truncation > calibration.head_dim:
        raise CalibrationError(
            f"truncation {calibration.truncation} exceeds head_dim {calibration.head_dim}"
        )
    if calibration.num_query_heads % calibration.num_kv_heads:
        raise CalibrationError(
            f"{calibration.num_query_heads} query heads are not a multiple of "
            f"{calibration.num_kv_heads} KV heads"
        )
    for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_dim"):
        if calibration.identity.get(name) != getattr(calibration, name):
            raise CalibrationError(
                f"field {name} is {getattr(calibration, name)}, the identity says "
                f"{calibration.identity.get(name)}"
            )
    if calibration.config_hash != identity_hash(calibration.identity):
        raise CalibrationError("config_hash does not belong to identity: the file was edited")


def _check_table(calibration: Calibration, source: str, measure: str, statistic: str) -> None:
    where = f"entropy.{source}.{measure}.{statistic}"
    rows: Any = calibration.entropy
    for key in (source, measure, statistic):
        if not isinstance(rows, dict) or key not in rows:
            raise CalibrationError(f"{where} is missing")
        rows = rows[key]
    _check_rows(calibration, where, rows)


def _check_importance(calibration: Calibration, found: Any) -> None:
    names = {"keeps", "shares", "samples", "tokens"}
    if not isinstance(found, dict) or set(found) != names:
        raise CalibrationError(f"field importance must be an object with {sorted(names)}")
    keeps, shares = found["keeps"], found["shares"]
    if (
        not _is(keeps, list)
        or not keeps
        or not all(_is(keep, (int, float)) and 0 < keep < 1 for keep in keeps)
        or sorted(set(keeps)) != keeps
    ):
        raise CalibrationError(f"importance.keeps is {keeps!r}, expected ascending ratios in 0..1")
    if not _is(shares, list) or len(shares) != len(keeps):
        raise CalibrationError(f"importance.shares must hold {len(keeps)} tables, one a keep ratio")
    for i, rows in enumerate(shares):
        _check_rows(calibration, f"importance.shares[{i}]", rows)
        if not any(value > 0 for row in rows for value in row):
            raise CalibrationError(f"importance.shares[{i}] is all zero: calibrate again")


def _check_rows(calibration: Calibration, where: str, rows: Any) -> None:
    layers, heads = calibration.num_layers, calibration.num_kv_heads
    lengths = [len(row) for row in rows if isinstance(row, list)] if _is(rows, list) else None
    if lengths != [heads] * layers or len(rows) != layers:
        raise CalibrationError(
            f"{where} has rows of lengths {lengths}, expected {layers} layers of {heads} KV heads"
        )
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if not _is(value, (int, float)) or not math.isfinite(value):
                raise CalibrationError(
                    f"{where}[{layer}][{head}] is {value!r}, expected a finite number"
                )
            if not 0 <= value <= ENTROPY_LIMIT:
                raise CalibrationError(
                    f"{where}[{layer}][{head}] is {value}, outside [0, 1]: calibrate again"
                )
