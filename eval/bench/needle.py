"""A needle in real text, answered by the live engine: the check behind the default policy.

One seven-digit number per sample in about 1,000 tokens of speeches, the question last (inside the
scoring window). Exact match. One engine per policy; keep ratios are per-request settings, so every
ratio sees the same engine and the same prompts. The full evaluation is another matter; this one
takes minutes and tells defaults apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from uncomp.eval.bench.rows import Row

NAME = "needle"
_KEYS = ("quiet-river", "brave-lamp", "golden-horse", "silent-tower", "gentle-cloud")
_TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
#: what is compared, as settings of the plugin
POLICIES: dict[str, dict[str, Any]] = {
    "uniform": {"policy": "uniform"},
    "entropy, renormalized": {"policy": "entropy", "measure": "renormalized"},
    "entropy, full": {"policy": "entropy", "measure": "full"},
    "entropy, renormalized, reversed": {
        "policy": "entropy",
        "measure": "renormalized",
        "reverse": True,
    },
    "entropy, full, reversed": {"policy": "entropy", "measure": "full", "reverse": True},
    "adakv": {"policy": "adakv"},
    "key_difference": {"policy": "key_difference"},
    "streaming": {"policy": "streaming"},
    "random": {"policy": "random"},
}


@dataclass(frozen=True)
class Setting:
    """What to run.

    Attributes:
        model: checkpoint folder or hub name.
        samples, tokens: number of prompts and length of the text around each needle.
        ratios: keep ratios; full KV is always run.
    """

    model: str
    samples: int = 40
    tokens: int = 1000
    ratios: tuple[float, ...] = (0.25, 0.125, 0.0625)
    policies: dict[str, dict[str, Any]] = field(default_factory=lambda: POLICIES)
    seed: int = 5


def prompts(tokenizer: Any, setting: Setting) -> tuple[list[str], list[str]]:
    """Prompts (chat template applied, answer begun) and the numbers they ask for."""
    folder = resources.files("uncomp.data")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".txt"))
    text = "\n".join((folder / n).read_text(encoding="utf-8") for n in names if "moby" not in n)
    ids = tokenizer.encode(text, add_special_tokens=False)
    draw = random.Random(setting.seed)
    asked, numbers = [], []
    for i in range(setting.samples):
        start = draw.randrange(len(ids) - setting.tokens)
        body = tokenizer.decode(ids[start : start + setting.tokens])
        number = str(draw.randrange(1_000_000, 10_000_000))
        key = f"{draw.choice(_KEYS)}-{i}"
        at = body.find(". ", int(len(body) * (0.05 + 0.85 * i / setting.samples))) + 2
        needle = f"One of the special magic numbers for {key} is: {number}. "
        question = f"\nWhat is the special magic number for {key} mentioned in the provided text?"
        content = _TASK + body[:at] + needle + body[at:] + question
        turns = [{"role": "user", "content": content}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        begun = f"The special magic number for {key} mentioned in the provided text is"
        asked.append(chat + begun)
        numbers.append(number)
    return asked, numbers


def bench(setting: Setting, say: Callable[[str], None]) -> list[Row]:
    """Score every policy at every ratio."""
    import gc

    from vllm import LLM, SamplingParams

    rows: list[Row] = []
    for policy, settings in setting.policies.items():
        llm = LLM(
            setting.model,
            max_model_len=setting.tokens + 512,
            enforce_eager=True,
            block_size=32,
            max_num_seqs=8,
            kv_cache_memory_bytes=1 << 30,
            additional_config={"uncomp": {"keep": 1.0, **settings}},
        )
        asked, numbers = prompts(llm.get_tokenizer(), setting)
        cases: list[tuple[str, dict[str, Any]]] = []
        if not rows:
            cases.append(("full KV", {"kv_compress": False}))
        cases += [(f"{policy}, keep {ratio}", {"kv_keep": ratio}) for ratio in setting.ratios]
        for name, extra in cases:
            params = SamplingParams(temperature=0, max_tokens=12, extra_args=extra)
            outputs = llm.generate(asked, params, use_tqdm=False)
            right = [
                float(number in output.outputs[0].text)
                for number, output in zip(numbers, outputs, strict=True)
            ]
            score = sum(right) / len(right)
            low, high = _wilson(sum(right), len(right))
            rows.append(Row(NAME, name, "exact match", "", score, low, high, len(right)))
            say(f"{name}: {score:.2f}")
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    return rows


def _wilson(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson score)."""
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
