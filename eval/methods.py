"""The methods that are compared, each one a name and its configuration.

A method is applied per request (``kv_policy``, ``kv_settings``, ``kv_keep``), so that one engine
answers the same prompt under all of them and the prefix cache computes it once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from uncomp.config import PREFILL_SCORES, PRESETS, UncompConfig
from uncomp.eval.run.records import Case

#: keep ratios that are compared unless others are asked for
KEEPS = (0.5, 0.25, 0.125, 0.0625)


#: settings of a method that are no `kv_settings` of its requests
_OF_THE_ENGINE = ("policy", "prefill_keep", "prefill_stages")
#: settings of a method that runs in kvpress and not in vLLM: the press, see `engines.kvpress.build`
_PRESS = "kvpress"


@dataclass(frozen=True)
class Method:
    """One way to keep a cache small.

    Attributes:
        name: short, as in tables.
        about: what it is and where it comes from.
        settings: of :class:`uncomp.config.UncompConfig`, beside the keep ratio; empty for the full
            cache. ``kvpress`` alone describes a press of that library instead.
        full: nothing is dropped.
        calibrated: needs a calibration file (entropies of queries, stages of layers, or what heads
            need).
        engine: arguments of the engine it needs, if not those of the run.
        library: "vllm", or "kvpress" with Hugging Face transformers.
    """

    name: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    full: bool = False
    calibrated: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    library: str = "vllm"

    def request(self, keep: float) -> dict[str, Any]:
        """``extra_args`` of a request (values that also fit ``vllm_xargs``)."""
        if self.full:
            return {"kv_compress": "false"}
        if _PRESS in self.settings:
            return {"kv_keep": keep, _PRESS: json.dumps(self.settings[_PRESS], sort_keys=True)}
        # Said even where it is the default: the engine's own may be those of another method.
        own = PRESETS.get(self.settings.get("policy", ""), {})
        default = UncompConfig(keep=1.0)
        rest: dict[str, Any] = {
            "window": own.get("window", default.window),
            "shares": default.shares,
        }
        if not self.calibrated:
            rest["calibration"] = None
        rest |= {k: v for k, v in self.settings.items() if k not in _OF_THE_ENGINE}
        prefill = self.settings.get("prefill_keep")
        return {
            **({} if prefill is None else {"kv_prefill_keep": prefill}),
            "kv_keep": keep,
            "kv_report": "true",
            "kv_policy": self.settings.get("policy", UncompConfig(keep=1.0).policy),
            "kv_settings": json.dumps(rest, sort_keys=True),
        }

    def config(self, keep: float = 1.0, **others: Any) -> UncompConfig:
        """The configuration object of an engine that serves only this method.

        One that prunes prompts needs stages or a calibration file among the ``others``.
        """
        return UncompConfig.from_mapping({"keep": keep, **self.settings, **others})


#: how SnapKV scores: the sum over its window, the best of a token's neighbours; wider pooling
_SNAPKV = {"window": 8, "window_reduce": "sum", "pooling": 15, "pooling_kind": "max"}


def _entropy(name: str, about: str, **settings: Any) -> Method:
    return Method(name, about, {"policy": "entropy", **settings})


def _prune(keep: float, scores: str) -> Method:
    return Method(
        f"prune-{keep}" if scores == UncompConfig.prefill_scores else f"prune-{keep}-{scores}",
        f"the default; {keep} of a prompt's tokens enter the last layers, chosen by {scores}",
        {"policy": UncompConfig(keep=1.0).policy, "prefill_keep": keep, "prefill_scores": scores},
        calibrated=True,
    )


def _press(name: str, about: str, **described: Any) -> Method:
    return Method(f"kvpress-{name}", f"kvpress: {about}", {_PRESS: described}, library="kvpress")


#: as kvpress ships and recommends them
_EXPECTED = {"class": "ExpectedAttentionPress", "epsilon": 0.01}

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("full", "full KV cache, the reference", full=True),
        Method(
            "full-fp8",
            "full KV cache stored as FP8 (e4m3); where the engine has it",
            full=True,
            engine={"kv_cache_dtype": "fp8"},
        ),
        Method("random", "tokens by chance (floor)", {"policy": "random"}),
        Method(
            "streaming",
            "first and last tokens (StreamingLLM, Xiao et al. 2024)",
            {"policy": "streaming"},
        ),
        Method("uncomp", "the default of this project", {"policy": UncompConfig(keep=1.0).policy}),
        Method("uniform", "the default's scores, equal budgets", {"policy": "uniform"}),
        Method(
            "ema",
            "the default's scores, handed on by tokens, over the ends of sentences too",
            {"policy": "adakv", "pooling_kind": "ema", "pooling": 16},
        ),
        Method(
            "by-score",
            "the default's scores, shares always by score",
            {"policy": "adakv", "equal_from": 0},
        ),
        Method(
            "snapkv",
            "attention of the last queries, equal budgets (SnapKV, Li et al. 2024), with a wider "
            "pooling of 15",
            {"policy": "uniform", **_SNAPKV},
        ),
        Method(
            "snapkv-paper",
            "SnapKV with its published pooling width of 7 and window of 32",
            {"policy": "uniform", **_SNAPKV, "pooling": 7, "window": 32, "sinks": 0},
        ),
        Method(
            "adakv",
            "SnapKV's scores as above, shares dealt by score within a layer (Ada-KV, Feng et al. "
            "2024)",
            {"policy": "adakv", "equal_from": 0, **_SNAPKV},
        ),
        Method(
            "pyramidkv",
            "SnapKV's scores as above, less from layer to layer (PyramidKV, Cai et al. 2024)",
            {"policy": "uniform", "shares": "pyramid", **_SNAPKV},
        ),
        Method("key-norm", "smallest keys (Devoto et al. 2024)", {"policy": "key_norm"}),
        Method(
            "key-difference",
            "keys least like the mean key (KeyDiff, Park et al. 2025)",
            {"policy": "key_difference"},
        ),
        Method(
            "key-difference-prerope",
            "the same before RoPE, handed on; needs no question",
            {"policy": "prerope_key_difference"},
        ),
        Method(
            "hybrid",
            "a quarter of the budget by the default's scores, the rest by key-difference-prerope's",
            {"policy": "hybrid"},
        ),
        Method(
            "calibrated",
            "the default's scores, one budget for the heads of all layers by what the calibration "
            "file says each one needs",
            {"policy": UncompConfig(keep=1.0).policy, "shares": "calibrated"},
            calibrated=True,
        ),
        Method(
            "hybrid-calibrated",
            "hybrid's scores, the same shares",
            {"policy": "hybrid", "shares": "calibrated"},
            calibrated=True,
        ),
        _entropy(
            "entropy",
            "the default's scores, shares by renormalised truncated entropy of the prompt's keys",
        ),
        _entropy("entropy-raw", "shares by raw truncated entropy", measure="raw"),
        _entropy("entropy-full", "shares by full entropy", measure="full"),
        _entropy("entropy-reversed", "control: high entropy keeps less", reverse=True),
        Method("uncomp-v1", "UNComp v1 as published", {"policy": "uncomp-v1"}, calibrated=True),
        Method("uncomp-v2", "UNComp v2 as published", {"policy": "uncomp-v2"}, calibrated=True),
        Method("kvpress-full", "kvpress: full cache, a check", full=True, library="kvpress"),
        _press("snapkv", "SnapKV, its window of 64 and pooling of 5", **{"class": "SnapKVPress"}),
        _press(
            "adakv-snapkv",
            "Ada-KV over its SnapKV",
            **{"class": "AdaKVPress", "press": {"class": "SnapKVPress"}},
        ),
        _press(
            "pyramidkv",
            "PyramidKV: fewer tokens in higher layers",
            **{"class": "PyramidKVPress"},
        ),
        _press("tova", "TOVA: attention of the last token", **{"class": "TOVAPress"}),
        _press("keydiff", "KeyDiff", **{"class": "KeyDiffPress"}),
        _press("expected", "expected attention", **_EXPECTED),
        _press(
            "adakv-expected",
            "Ada-KV over expected attention",
            **{"class": "AdaKVPress", "press": _EXPECTED},
        ),
        _press(
            "critical-expected",
            "CriticalKV and Ada-KV over expected attention",
            **{
                "class": "CriticalAdaKVPress",
                "press": {"class": "ExpectedAttentionPress", "use_vnorm": False},
            },
        ),
        _press(
            "kvzip",
            "KVzip: reads the context again; for prompts before their question",
            **{"class": "KVzipPress"},
        ),
        *(_prune(keep, scores) for scores in PREFILL_SCORES for keep in (0.75, 0.5, 0.375)),
    )
}


def find(
    names: Iterable[str],
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    query_agnostic: bool = False,
) -> list[Method]:
    """Methods by name, the full cache first (it is always run: everything is compared with it).

    Args:
        extra: further methods of the user's, name to settings.
        query_agnostic: prompts are compressed before their question, for which the default has
            another policy.

    Raises:
        ValueError: unknown; says what there is.
    """
    known = dict(METHODS)
    if query_agnostic:
        policy = UncompConfig(keep=1.0).policy_before_question
        known["uncomp"] = replace(known["uncomp"], settings={"policy": policy})
    for name, settings in (extra or {}).items():
        if name in known:
            raise ValueError(f"method {name!r} is built in: give yours another name")
        if _PRESS in settings and len(settings) > 1:
            raise ValueError(f"method {name!r}: {_PRESS!r} takes no other settings beside it")
        known[name] = Method(
            name,
            "given by the user",
            dict(settings),
            calibrated="prefill_keep" in settings or settings.get("shares") == "calibrated",
            library="kvpress" if _PRESS in settings else "vllm",
        )
    chosen: dict[str, Method] = {"full": known["full"]}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; there are: {', '.join(known)}")
        chosen[name] = known[name]
    for method in chosen.values():
        if method.full or method.library != "vllm":
            continue
        # Only the engine knows the stages and the calibration: these stand for them.
        given: dict[str, Any] = {"prefill_stages": "1"}
        given["calibration"] = "?" if method.calibrated else None
        method.config(**{k: v for k, v in given.items() if k not in method.settings})
    return list(chosen.values())


def cases(methods: Sequence[Method], keeps: Sequence[float]) -> list[Case]:
    """Every method at every keep ratio; the full cache once."""
    found: list[Case] = []
    for method in methods:
        found += [Case(method.name, keep) for keep in ((1.0,) if method.full else keeps)]
    return found


def server_settings(methods: Sequence[Method], calibration: str | None = None) -> dict[str, Any]:
    """Settings of an engine that can answer under all of these methods.

    It compresses nothing unless asked, and remembers as many queries as the widest window needs.
    """
    windows = [
        {**PRESETS.get(m.settings.get("policy", ""), {}), **m.settings}.get("window", 0)
        for m in methods
    ]
    window = max([UncompConfig(keep=1.0).window, *windows])
    settings: dict[str, Any] = {"keep": 1.0, "policy": "entropy", "window": window}
    if any("prefill_keep" in method.settings for method in methods):
        settings["prefill_keep"] = 1.0
    shares = {method.settings.get("shares") for method in methods}
    for name in ("calibrated", "pyramid"):  # a server that has read the file serves both
        if name in shares:
            settings["shares"] = name
            break
    stages = {m.settings["prefill_stages"] for m in methods if "prefill_stages" in m.settings}
    if len(stages) > 1:
        raise ValueError(f"one engine has one set of prefill_stages, the methods have {stages}")
    if stages:
        settings["prefill_stages"] = stages.pop()
    if calibration is not None:
        settings["calibration"] = calibration
    return settings
