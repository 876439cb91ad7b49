"""The settings of the plugin: one validated, immutable object, the source of every threshold.

The same field names are used in ``--additional-config '{"uncomp": {...}}'``, in a YAML file
(``uncomp serve --kv-config FILE``) and, with a ``--kv-`` prefix, on the command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEASURES = ("raw", "renormalized", "full")
SOURCES = ("keys", "queries")
REDUCTIONS = ("sum", "max")
POOLINGS = ("max", "ema", "word")
PREFILL_SCORES = ("handed-on", "attention")
SHARES = ("policy", "calibrated", "pyramid")
#: shares -> `floor` where it is not given
FLOORS = {"policy": 0.2, "calibrated": 0.5, "pyramid": 0.0}
OVERRIDES = ("allow", "tighten", "forbid")

#: Published settings (method: UNComp). ``from_mapping`` fills them in where nothing is given.
#: Both rank heads by the raw truncated entropy of their *queries*, which needs a calibration file,
#: score with a max-pool of 7, and force no first tokens.
_PUBLISHED = {
    "window": 8,
    "window_reduce": "sum",
    "pooling": 7,
    "pooling_kind": "max",
    "sinks": 0,
    "measure": "raw",
    "source": "queries",
    "shares": "policy",
    "recent": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    # two groups with budgets 512 and 256
    "uncomp-v1": {**_PUBLISHED, "groups": 2, "ratio": 2.0, "budget": 384},
    # eight groups with budgets 640, 566, ... 122
    "uncomp-v2": {**_PUBLISHED, "groups": 8, "ratio": 640 / 122, "budget": 381},
}


def _meta(help: str) -> dict[str, str]:
    return {"help": help}


@dataclass(frozen=True, kw_only=True)
class UncompConfig:
    """What to keep, how to choose it, and when. Exactly one of ``keep`` and ``budget`` is given."""

    keep: float | None = field(
        default=None,
        metadata=_meta(
            "keep ratio: kept KV bytes over native KV bytes, in (0, 1]; at each compaction it "
            "applies to all tokens seen so far. 1 keeps everything unless a request asks"
        ),
    )
    budget: int | None = field(
        default=None,
        metadata=_meta(
            "tokens kept per KV head (mean over the heads of a layer), independent of the length: "
            "a long generation runs in constant memory"
        ),
    )
    policy: str = field(
        default="adakv",
        metadata=_meta("what decides scores and shares (uncomp.policies), or a preset"),
    )
    early_policy: str | None = field(
        default=None,
        metadata=_meta(
            "policy of requests that are compressed in the middle of their prompt (kv_compact_at), "
            "where what they will be asked is not known yet; default: hybrid if the policy is "
            "adakv, else the policy"
        ),
    )
    window: int = field(default=32, metadata=_meta("last queries that score the tokens"))
    window_reduce: str = field(
        default="max", metadata=_meta("how the scores of the queries of the window combine")
    )
    recent: int | None = field(
        default=None,
        metadata=_meta(
            "last tokens that every head keeps (default: the window's); fewer leave heads that "
            "need little of the cache more of it to others"
        ),
    )
    sinks: int = field(default=4, metadata=_meta("first tokens that always stay"))
    pooling: int = field(
        default=4,
        metadata=_meta("how far a score reaches, in words or tokens; see pooling_kind"),
    )
    pooling_kind: str = field(
        default="word",
        metadata=_meta(
            "word: a score reaches the words after it, falling by e every `pooling` of them, and "
            "those before it half as far, inside its sentence or line; ema: the same in tokens, "
            "not minding sentences; max: the largest of `pooling` neighbours (odd; 1: none)"
        ),
    )
    reduce: str = field(
        default="sum", metadata=_meta("how scores of query heads that share a KV head combine")
    )
    shares: str = field(
        default="policy",
        metadata=_meta(
            "policy: the policy deals every layer's part to its heads; calibrated: the heads of "
            "all layers share the budget by how much the calibration file says each one needs; "
            "pyramid: less from layer to layer (PyramidKV)"
        ),
    )
    floor: float | None = field(
        default=None,
        metadata=_meta(
            "share of an equal budget that every head keeps in any case, 0..1; 1 is equal shares "
            "(default: 0.5 where shares are calibrated, but 0.2 with the hybrid policy, which is "
            "for questions to come; 0.2 in the adakv policy; 0 in a pyramid)"
        ),
    )
    equal_from: int = field(
        default=192,
        metadata=_meta(
            "adakv policy: heads share equally where each would have at least so many tokens, and "
            "by score below; 0: always by score"
        ),
    )
    attention_share: float = field(
        default=0.25,
        metadata=_meta(
            "hybrid policy: part of the budget for what the last queries attend to, in (0, 1); the "
            "rest goes to keys unlike the others"
        ),
    )
    groups: int = field(
        default=8, metadata=_meta("entropy policy: head groups per layer (at most the KV heads)")
    )
    ratio: float = field(
        default=2.0, metadata=_meta("entropy policy: share of the top group over the bottom group")
    )
    reverse: bool = field(
        default=False, metadata=_meta("entropy policy: high entropy keeps less (ablation)")
    )
    measure: str = field(
        default="renormalized", metadata=_meta("truncated entropy: raw, renormalized or full")
    )
    source: str = field(
        default="keys",
        metadata=_meta("whose entropy: keys or queries (queries: calibrated only)"),
    )
    truncation: int | None = field(
        default=None, metadata=_meta("eigenvalues kept in the entropy (default: head size / 4)")
    )
    calibration: str | None = field(
        default=None,
        metadata=_meta("file of `uncomp calibrate`; without it entropies come from the prompt"),
    )
    online_tokens: int = field(
        default=1024, metadata=_meta("tokens sampled per head for the online entropy")
    )
    prefill_keep: float | None = field(
        default=None,
        metadata=_meta(
            "prefill token pruning: fraction of a prompt's tokens that enters the last stage of "
            "layers, in (0, 1]; the others stop on the way there. 1 prunes nothing unless a "
            "request asks (kv_prefill_keep)"
        ),
    )
    prefill_scores: str = field(
        default="handed-on",
        metadata=_meta(
            "which tokens go on: handed-on (the best of the last 32 queries, handed on to the "
            "tokens that follow) or attention (UNComp: the sum of the last 8)"
        ),
    )
    prefill_stages: str | None = field(
        default=None,
        metadata=_meta(
            "first layers of the stages after the first, e.g. 2,15,26,31; without it the largest "
            "drops of the calibration's entropy"
        ),
    )
    prefill_floor: int = field(
        default=1536, metadata=_meta("no stage of layers reads fewer tokens of a prompt than this")
    )
    min_tokens: int = field(default=256, metadata=_meta("shorter sequences are never compressed"))
    recompact_every: int = field(
        default=512,
        metadata=_meta("tokens generated between compactions while decoding; 0 = never again"),
    )
    overrides: str = field(
        default="allow",
        metadata=_meta(
            "per-request settings: allow; tighten (a request may keep more, never less); forbid"
        ),
    )
    min_keep: float = field(
        default=0.0, metadata=_meta("lowest keep ratio that a request may ask for")
    )
    seed: int = field(default=0, metadata=_meta("seed of the random policy"))
    relocate: bool = field(
        default=False,
        metadata=_meta(
            "self-check: drop nothing, but move every token to another head's place; outputs must "
            "equal the unmodified engine's"
        ),
    )
    trace: str | None = field(
        default=None,
        metadata=_meta("folder: every compaction's kept positions are written there"),
    )

    def __post_init__(self) -> None:
        self._check_types()
        if (self.keep is None) == (self.budget is None):
            raise ValueError(
                f"give exactly one of keep (a ratio in (0, 1]) and budget (tokens per KV head); "
                f"got keep={self.keep}, budget={self.budget}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: must be in (0, 1], e.g. 0.25")
        if self.prefill_keep is not None:
            self._check_prefill(self.prefill_keep)
        self._check_range("prefill_floor", self.prefill_floor, 0)
        self._check_range("recent", self.recent, 1)
        self._check_range("budget", self.budget, self.recent_tokens + self.sinks)
        self._check_range("window", self.window, 1, 256)
        self._check_range("sinks", self.sinks, 0)
        self._check_range("pooling", self.pooling, 1, 1024)
        self._check_range("equal_from", self.equal_from, 0)
        self._check_range("groups", self.groups, 1)
        self._check_range("truncation", self.truncation, 1)
        self._check_range("online_tokens", self.online_tokens, 64)
        self._check_range("min_tokens", self.min_tokens, 1)
        self._check_range("recompact_every", self.recompact_every, 0)
        self._check_choice("pooling_kind", self.pooling_kind, POOLINGS)
        if self.pooling_kind == "max" and self.pooling % 2 == 0:
            raise ValueError(
                f"pooling={self.pooling}: must be odd with pooling_kind='max', so that it has a "
                f"centre"
            )
        if not self.ratio >= 1:
            raise ValueError(f"ratio={self.ratio}: must be at least 1 (use reverse to flip)")
        if self.floor is not None and not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must be in [0, 1]")
        if not 0 < self.attention_share < 1:
            raise ValueError(
                f"attention_share={self.attention_share}: must be in (0, 1), e.g. 0.25"
            )
        if not 0 <= self.min_keep <= 1:
            raise ValueError(f"min_keep={self.min_keep}: must be in [0, 1]")
        self._check_choice("reduce", self.reduce, REDUCTIONS)
        self._check_choice("window_reduce", self.window_reduce, REDUCTIONS)
        self._check_choice("measure", self.measure, MEASURES)
        self._check_choice("prefill_scores", self.prefill_scores, PREFILL_SCORES)
        self._check_choice("source", self.source, SOURCES)
        self._check_choice("overrides", self.overrides, OVERRIDES)
        self._check_choice("policy", self.policy, (*_policy_names(), *PRESETS))
        if self.early_policy is not None:
            self._check_choice("early_policy", self.early_policy, (*_policy_names(), *PRESETS))
        self._check_choice("shares", self.shares, SHARES)
        if self.shares == "calibrated" and self.calibration is None:
            raise ValueError(
                "shares='calibrated' needs a calibration file: run `uncomp calibrate MODEL -o "
                "FILE` and set calibration=FILE"
            )
        if self.source == "queries" and self.calibration is None and self.uses_entropy:
            raise ValueError(
                f"policy={self.policy!r} with source='queries' needs a calibration file: run "
                f"`uncomp calibrate MODEL -o FILE` and set calibration=FILE, or use source='keys'"
            )

    def _check_prefill(self, keep: float) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"prefill_keep={keep}: must be in (0, 1], e.g. 0.5")
        if self.prefill_stages is None and self.calibration is None:
            raise ValueError(
                f"prefill_keep={keep} needs to know the stages of the model: run `uncomp calibrate "
                f"MODEL -o FILE` and set calibration=FILE, or name their first layers, e.g. "
                f"prefill_stages='2,15,26,31'"
            )
        if self.prefill_stages is not None:
            from uncomp.pruning import parse_layers

            parse_layers(self.prefill_stages)

    @property
    def recent_tokens(self) -> int:
        """Last tokens that every head keeps."""
        return self.window if self.recent is None else self.recent

    @property
    def least_share(self) -> float:
        """Share of an equal budget that every head keeps in any case."""
        if self.floor is not None:
            return self.floor
        # What a known question needs is where it looks, in any head; what any question may need is
        # where heads look things up (docs/quality.md).
        is_early = self.shares == "calibrated" and self.policy_name == "hybrid"
        return 0.2 if is_early else FLOORS[self.shares]

    @property
    def policy_name(self) -> str:
        """The policy behind a preset (``uncomp-v1`` is the entropy policy)."""
        return "entropy" if self.policy in PRESETS else self.policy

    @property
    def policy_before_question(self) -> str:
        """The policy of requests that are compressed in the middle of their prompt."""
        return self.early_policy or ("hybrid" if self.policy == "adakv" else self.policy)

    @property
    def uses_entropy(self) -> bool:
        return self.policy_name == "entropy"

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> UncompConfig:
        """Build from ``additional_config["uncomp"]`` or a YAML file.

        Raises:
            ValueError: for an unknown field (naming the allowed ones) or a bad value.
        """
        if not isinstance(given, Mapping):
            raise ValueError(
                f'the "uncomp" settings must be an object like {{"keep": 0.25}}, got {given!r}'
            )
        allowed = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(allowed))
        if unknown:
            raise ValueError(f"unknown uncomp setting {unknown}; allowed: {allowed}")
        return cls(**{**_preset(given.get("policy"), given.get("keep")), **given})

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, JSON-ready; ``from_mapping`` reads it back."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        defaults |= _preset(self.policy, self.keep)
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value != defaults[name]
        }

    def _check_types(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kinds = [kind.strip() for kind in str(f.type).split("|")]
            if "float" in kinds and type(value) is int:
                object.__setattr__(self, f.name, float(value))
            elif type(value).__name__ not in kinds and not (value is None and "None" in kinds):
                raise ValueError(f"{f.name}={value!r}: must be of type {f.type}")

    @staticmethod
    def _check_range(name: str, value: int | None, low: int, high: int | None = None) -> None:
        if value is not None and (value < low or (high is not None and value > high)):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            why = " (recent tokens + sinks, which always stay)" if name == "budget" else ""
            raise ValueError(f"{name}={value}: must be {bound}{why}")

    @staticmethod
    def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {list(allowed)}")


def _policy_names() -> tuple[str, ...]:
    # Imported late: policies import torch, and reading the settings' help should not.
    from uncomp.policies import names

    return names()


def _preset(policy: Any, keep: Any) -> dict[str, Any]:
    """What a preset fills in; its budget only if no keep ratio is given."""
    settings = PRESETS.get(policy, {}) if isinstance(policy, str) else {}
    return {k: v for k, v in settings.items() if k != "budget" or keep is None}
