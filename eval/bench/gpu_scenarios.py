"""What the engine part runs: engines ("arms") of each scenario and what is asked of them.

Nothing but data: an arm is a JSON object that `gpu_load` carries out in a process of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NAMES = (
    "paper",
    "paper-fp8",
    "paper-whole",
    "decode32k",
    "decode32k-more",
    "end-to-end",
    "light",
    "pruned32k",
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
TOY: dict[str, Any] = {
    **LLAMA,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Sizes:
    """Lengths, pools and times; toy ones for dry runs.

    Attributes:
        config: of the model. pool: bytes of the KV pool, of the scenarios that limit it.
        prompt, output, budget: the paper's setting. context: of the long ones.
        long_output: of end-to-end. requests: of end-to-end.
        most: requests that an engine runs at once at most.
        window, settle: seconds measured, and most seconds until the engine is in a steady state.
        lengths: prompts of which the time to first token is taken.
        repeats: of light load.
        stages: first layers of the later stages, where prompts are pruned.
        engine: further arguments of every engine.
        uncomp: further settings of the plugin.
        env: further environment of every engine.
    """

    config: dict[str, Any]
    pool: int
    prompt: int
    output: int
    budget: int
    context: int
    long_output: int
    requests: int
    most: int
    window: float
    settle: float
    lengths: tuple[int, ...]
    repeats: int
    keep: tuple[float, ...]
    stages: str
    engine: dict[str, Any] = field(default_factory=dict)
    uncomp: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def token_bytes(self, itemsize: int = 2) -> int:
        """K and V of one token in all layers and heads."""
        c = self.config
        heads, size = c["num_key_value_heads"], c["head_dim"]
        return 2 * c["num_hidden_layers"] * heads * size * itemsize


REAL = Sizes(
    LLAMA,
    pool=20 << 30,
    prompt=2048,
    output=8192,
    budget=384,
    context=32768,
    long_output=512,
    requests=12,
    most=512,
    window=40,
    settle=150,
    lengths=(2048, 8192, 32768),
    # The budget is held to 384 to 512 tokens per head, as the paper holds it constant.
    uncomp={"recompact_every": 128},
    repeats=7,
    keep=(0.0474, 0.125, 0.25, 0.5),
    stages="2,15,26,31",  # as published for Llama-2-7B, which has as many layers
    engine={"max_num_batched_tokens": 8192, "block_size": 16},
    # Where both runners could serve, the first one is meant.
    env={"VLLM_USE_V2_MODEL_RUNNER": "0"},
)
DRY = Sizes(
    TOY,
    pool=2 << 20,
    prompt=96,
    output=160,
    budget=32,
    context=256,
    long_output=8,
    requests=3,
    most=16,
    window=1.0,
    settle=5.0,
    lengths=(96,),
    repeats=2,
    keep=(0.125, 0.5),
    stages="1",
    engine={"max_num_batched_tokens": 512, "block_size": 32, "enforce_eager": True},
    uncomp={"min_tokens": 64, "recompact_every": 64},
    env={"VLLM_CPU_OMP_THREADS_BIND": "0-0", "OMP_NUM_THREADS": "1"},
)


class Arms:
    """Builds arms of one set of sizes for a model folder."""

    def __init__(self, sizes: Sizes, model: str) -> None:
        self.sizes, self.model = sizes, model

    def arm(
        self,
        runs: list[dict[str, Any]],
        uncomp: dict[str, Any] | None,
        context: int,
        pool: int | None,
        fp8: bool = False,
    ) -> dict[str, Any]:
        """An engine.

        Args:
            uncomp: settings of the plugin; None: stock vLLM, plugins not loaded.
            context: longest sequence.
            pool: bytes of the KV pool; None: what vLLM takes by itself (90 % of the GPU).
            fp8: of the KV cache.
        """
        sizes = self.sizes
        engine: dict[str, Any] = {
            "max_model_len": context,
            "max_num_seqs": sizes.most,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "seed": 0,
            **sizes.engine,
        }
        if pool is not None:
            engine["kv_cache_memory_bytes"] = pool
        if fp8:
            engine["kv_cache_dtype"] = "fp8"
        env = dict(sizes.env)
        if uncomp is None:
            env["VLLM_PLUGINS"] = ""
        else:
            # No tokenizer, no words.
            by_tokens = {"pooling_kind": "ema", "pooling": 16}
            engine["additional_config"] = {"uncomp": {**by_tokens, **sizes.uncomp, **uncomp}}
        return {"model": self.model, "engine": engine, "env": env, "runs": runs}

    def generating(
        self, budget: int | None, pool: int | None, fp8: bool = False, expected: int = 0
    ) -> dict[str, Any]:
        """The paper's setting, load above capacity, in a steady state from the beginning.

        Requests of a steady state are at every point of their output. The first ones start there:
        with full KV their prompt is as long as what they would have written by then; compressed
        ones hold the same whatever they have written, so their outputs are cut short instead.

        Args:
            expected: bytes of the pool where vLLM decides.
        """
        sizes = self.sizes
        total = sizes.prompt + sizes.output
        # Mean tokens held: half of the output; or the budget and half of what grows until the next
        # compaction.
        mean = sizes.prompt + sizes.output / 2 if budget is None else budget + 256
        bytes_ = sizes.token_bytes(1 if fp8 else 2)
        started = min(int((pool or expected) / bytes_ / mean), sizes.most)
        run = {
            "kind": "steady",
            "name": "steady",
            "prompt": sizes.prompt,
            "output": sizes.output,
            "started": started,
            "written": "prompt" if budget is None else "output",
            "waiting": max(8, started // 4),
            "window": sizes.window,
            "settle": sizes.settle,
        }
        uncomp = None if budget is None else {"budget": budget}
        return self.arm([run], uncomp, total + 32, pool, fp8)

    def decoding(self, keep: list[float] | None) -> dict[str, Any]:
        """Decoding at a long context, prompts already in, more requests than fit."""
        sizes = self.sizes
        fit = sizes.pool / sizes.token_bytes() / sizes.context
        runs = []
        for ratio in keep or [1.0]:
            runs.append(
                {
                    "kind": "steady",
                    "name": str(ratio),
                    "prompt": sizes.context,
                    # Longer than anything is measured: nothing ends in the window.
                    "output": sizes.output,
                    "started": 0,
                    "written": "output",
                    "waiting": min(sizes.most, int(fit / ratio * 1.25) + 2),
                    "window": sizes.window / 2,
                    "settle": sizes.settle,
                    # Compressed requests own what they keep; a shared prompt only gets them in
                    # sooner. Full KV would share its memory: every prompt is another one.
                    "same_prompt": keep is not None,
                    "extra_args": None if keep is None else {"kv_keep": ratio},
                }
            )
        uncomp = None if keep is None else {"keep": 1.0}
        return self.arm(runs, uncomp, sizes.context + sizes.output + 32, sizes.pool)

    def whole_requests(self, keep: float | None) -> dict[str, Any]:
        """Long prompts and short answers from beginning to end; and the prompts alone."""
        sizes = self.sizes
        runs = [
            {
                "kind": "batch",
                "name": name,
                "count": sizes.requests,
                "length": sizes.context,
                "max_tokens": tokens,
                "repeat": 1,
            }
            for name, tokens in (("requests", sizes.long_output), ("prompts", 1))
        ]
        uncomp = None if keep is None else {"keep": keep}
        return self.arm(runs, uncomp, sizes.context + sizes.long_output + 32, sizes.pool)

    def lightly(self, uncomp: dict[str, Any] | None, off: bool = False) -> dict[str, Any]:
        """1 and 4 requests at a time, and prompts alone, in an ample pool.

        Args:
            off: requests opt out.
        """
        sizes = self.sizes
        common = {
            "kind": "batch",
            "repeat": sizes.repeats,
            "extra_args": {"kv_compress": False} if off else None,
        }
        runs = [
            {**common, "name": f"{n} requests", "count": n, "length": sizes.prompt,
             "max_tokens": min(256, sizes.output)}
            for n in (1, 4)
        ]  # fmt: skip
        runs += [
            {**common, "name": f"first token of {n}", "count": 1, "length": n, "max_tokens": 1}
            for n in sizes.lengths
        ]
        return self.arm(runs, uncomp, max(sizes.lengths) + 512, None if self._real else sizes.pool)

    def pruning(self, fractions: list[float] | None) -> dict[str, Any]:
        """Single long prompts, nothing generated; nothing is compacted.

        Args:
            fractions: that enter the last stage, one run each; None: stock vLLM, which reads the
                prompt in chunks.
        """
        sizes = self.sizes
        common = {
            "kind": "batch",
            "count": 1,
            "length": sizes.context,
            "max_tokens": 1,
            "repeat": sizes.repeats,
        }
        runs = [
            {
                **common,
                "name": str(fraction),
                "extra_args": None if fractions is None else {"kv_prefill_keep": fraction},
            }
            for fraction in fractions or [1.0]
        ]
        uncomp = None
        if fractions is not None:
            uncomp = {"keep": 1.0, "prefill_keep": 1.0, "prefill_stages": sizes.stages}
        context = sizes.context + 32
        arm = self.arm(runs, uncomp, context, None if self._real else sizes.pool)
        if fractions is not None:
            arm["engine"]["max_num_batched_tokens"] = context + sizes.most
            arm["engine"]["additional_config"]["uncomp"]["prefill_floor"] = sizes.context // 8
        return arm

    @property
    def _real(self) -> bool:
        return self.sizes is REAL
