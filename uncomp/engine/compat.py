"""The only module that knows vLLM versions. It probes features where it can.

``CONTRACT`` lists every vLLM symbol that uncomp subclasses, calls or reads, with the parameters it
relies on. It is checked against source text, so a version can be judged without installing it:

    python -m uncomp.engine.compat FOLDER      # an unpacked vLLM wheel; exit status is the verdict

``make contract`` does that for every supported version.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

#: supported vLLM versions: first, and first unsupported
FIRST, BEYOND = (0, 26), (0, 34)

_CORE = "v1/core/"
_MANAGER = _CORE + "single_type_kv_cache_manager.py"
_CPU = "v1/attention/backends/cpu_attn.py"
_FLASH = "v1/attention/backends/flash_attn.py"
_RUNNER = "v1/worker/gpu_model_runner.py"
_OPS = "_custom_ops.py"

#: (file inside the vllm package, symbol, parameters or fields it must have)
CONTRACT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # patches
    ("engine/arg_utils.py", "EngineArgs.create_engine_config", ("self",)),
    ("engine/arg_utils.py", "EngineArgs", ("additional_config", "block_size")),
    (
        "v1/engine/input_processor.py",
        "InputProcessor.process_inputs",
        ("self", "request_id", "prompt", "params"),
    ),
    ("entrypoints/serve/instrumentator/metrics.py", "attach_router", ("app",)),
    ("exceptions.py", "VLLMValidationError", ()),
    # configuration
    ("config/vllm.py", "VllmConfig", ("additional_config", "instance_id", "speculative_config")),
    ("config/vllm.py", "VllmConfig.use_v2_model_runner", ("self",)),
    ("config/scheduler.py", "SchedulerConfig", ("scheduler_cls", "async_scheduling")),
    ("config/scheduler.py", "SchedulerConfig.get_scheduler_cls", ("self",)),
    ("config/parallel.py", "ParallelConfig", ("worker_cls", "data_parallel_index")),
    ("config/parallel.py", "ParallelConfig", ("_api_process_rank", "_api_process_count")),
    ("config/parallel.py", "ParallelConfig", ("decode_context_parallel_size", "rank")),
    # pruning: hooks on decoder layers, and the metadata of the layers that follow
    ("engine/arg_utils.py", "EngineArgs", ("max_num_batched_tokens", "enable_chunked_prefill")),
    (
        "config/scheduler.py",
        "SchedulerConfig",
        ("max_num_batched_tokens", "long_prefill_token_threshold"),
    ),
    ("forward_context.py", "get_forward_context", ()),
    ("forward_context.py", "ForwardContext", ("attn_metadata", "slot_mapping")),
    ("distributed/communication_op.py", "tensor_model_parallel_all_reduce", ("input_",)),
    ("distributed/parallel_state.py", "get_tensor_model_parallel_world_size", ()),
    # scheduler side
    (_CORE + "sched/scheduler.py", "Scheduler.schedule", ("self",)),
    (
        _CORE + "sched/scheduler.py",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    (_CORE + "sched/scheduler.py", "Scheduler.add_request", ("self", "request")),
    (
        _CORE + "sched/scheduler.py",
        "Scheduler._mamba_block_aligned_split",
        ("self", "request", "num_new_tokens"),
    ),
    (_CORE + "sched/scheduler.py", "Scheduler.shutdown", ("self",)),
    (_CORE + "sched/async_scheduler.py", "AsyncScheduler", ()),
    (
        _CORE + "sched/output.py",
        "SchedulerOutput",
        (
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
            "finished_req_ids",
            "preempted_req_ids",
        ),
    ),
    (_CORE + "sched/output.py", "CachedRequestData", ("resumed_req_ids",)),
    (
        "v1/engine/__init__.py",
        "EngineCoreOutput",
        ("request_id", "finish_reason", "kv_transfer_params"),
    ),
    ("v1/engine/__init__.py", "EngineCoreOutputs", ("outputs",)),
    (_CORE + "block_pool.py", "BlockPool.get_num_free_blocks", ("self",)),
    (_CORE + "block_pool.py", "BlockPool.get_new_blocks", ("self", "num_blocks")),
    (_CORE + "block_pool.py", "BlockPool.free_blocks", ("self", "ordered_blocks")),
    (_CORE + "block_pool.py", "BlockPool.evict_blocks", ("self", "block_ids")),
    (_MANAGER, "SingleTypeKVCacheManager.pop_blocks_for_free", ("self", "request_id")),
    (_MANAGER, "SingleTypeKVCacheManager.free", ("self", "request_id")),
    (_MANAGER, "SingleTypeKVCacheManager.cache_blocks", ("self", "request")),
    (
        _MANAGER,
        "FullAttentionManager.find_longest_cache_hit",
        ("cls", "block_hashes", "max_length", "kv_cache_spec"),
    ),
    (
        "v1/kv_cache_spec_registry.py",
        "KVCacheSpecRegistry.register",
        ("cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    ("v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry._ensure_registered", ("cls",)),
    ("v1/kv_cache_interface.py", "FullAttentionSpec", ("sliding_window", "attention_chunk_size")),
    ("v1/kv_cache_interface.py", "FullAttentionSpec.merge", ("cls", "specs")),
    # worker side
    ("v1/worker/cpu_worker.py", "CPUWorker.__init__", ("self", "vllm_config")),
    ("v1/worker/gpu_worker.py", "Worker.load_model", ("self",)),
    ("v1/worker/gpu_worker.py", "Worker.get_kv_cache_spec", ("self",)),
    ("v1/worker/gpu_worker.py", "Worker.initialize_from_config", ("self", "kv_cache_config")),
    ("v1/worker/gpu_worker.py", "Worker.execute_model", ("self", "scheduler_output")),
    ("v1/worker/gpu_worker.py", "Worker.sample_tokens", ("self",)),
    ("v1/worker/cpu_model_runner.py", "CPUModelRunner", ()),
    ("v1/worker/utils.py", "AttentionGroup.get_metadata_builder", ("self",)),
    # attention
    ("v1/attention/selector.py", "_cached_get_attn_backend", ()),
    ("v1/attention/backends/registry.py", "register_backend", ("backend", "class_path")),
    (_CPU, "CPUAttentionBackend.get_impl_cls", ()),
    (_CPU, "CPUAttentionBackend.get_builder_cls", ()),
    (
        _CPU,
        "CPUAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    (
        _CPU,
        "CPUAttentionMetadata",
        (
            "num_actual_tokens",
            "max_query_len",
            "query_start_loc",
            "max_seq_len",
            "seq_lens",
            "block_table",
            "slot_mapping",
            "scheduler_metadata",
        ),
    ),
    (
        _CPU,
        "CPUAttentionBackendImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    (
        "v1/attention/backend.py",
        "CommonAttentionMetadata",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "block_table_tensor",
            "slot_mapping",
        ),
    ),
    ("v1/attention/backend.py", "CommonAttentionMetadata.replace", ("self",)),
    # GPUs
    ("v1/attention/backend.py", "AttentionCGSupport", ("UNIFORM_SINGLE_TOKEN_DECODE",)),
    (
        "v1/attention/backend.py",
        "AttentionMetadataBuilder",
        ("_cudagraph_support", "reorder_batch_threshold", "supports_update_block_table"),
    ),
    (_FLASH, "FlashAttentionBackend.get_impl_cls", ()),
    (_FLASH, "FlashAttentionBackend.get_builder_cls", ()),
    (
        _FLASH,
        "FlashAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    (
        _FLASH,
        "FlashAttentionImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    (_FLASH, "FlashAttentionImpl.do_kv_cache_update", ("self", "kv_cache", "slot_mapping")),
    (_RUNNER, "AsyncGPUModelRunnerOutput.get_output", ("self",)),
    (_RUNNER, "GPUModelRunner._build_attention_metadata", ("self",)),
    ("v1/worker/gpu_input_batch.py", "CachedRequestState", ("block_ids",)),
    ("v1/worker/block_table.py", "BlockTable.get_device_tensor", ("self",)),
    ("config/cache.py", "CacheConfig", ("cache_dtype",)),
    (
        _OPS,
        "cpu_attn_get_scheduler_metadata",
        ("num_reqs", "num_heads", "num_kv_heads", "head_dim", "seq_lens", "dtype", "isa"),
    ),
    (
        _OPS,
        "cpu_attention_with_kv_cache",
        ("query", "key_cache", "value_cache", "output", "block_table", "s_aux", "kv_cache_dtype"),
    ),
    (
        _OPS,
        "cpu_attn_reshape_and_cache",
        ("key", "value", "key_cache", "value_cache", "slot_mapping", "isa", "kv_cache_dtype"),
    ),
)


class VersionError(ValueError):
    """This vLLM version is not supported."""


def check_version(version: str) -> None:
    """Refuse a vLLM version outside the supported range.

    Raises:
        VersionError: names the version and the range.
    """
    parts = version.split("+")[0].split(".")
    try:
        have = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError) as error:
        raise VersionError(f"uncomp: cannot read the vLLM version {version!r}") from error
    if not FIRST <= have < BEYOND:
        first, beyond = (".".join(map(str, v)) for v in (FIRST, BEYOND))
        raise VersionError(
            f"uncomp: vLLM {version} is installed, supported are {first} up to but not including "
            f"{beyond}. Install a supported version, or set UNCOMP_DISABLE=1 to serve without"
        )


def broken_symbols(package: Path) -> list[str]:
    """Check ``CONTRACT`` against the source of a vLLM package folder; one line per problem."""
    problems = []
    for file, symbol, names in CONTRACT:
        path = package / file
        node = _find(path, symbol) if path.is_file() else None
        if node is None:
            problems.append(f"{file}: {symbol} does not exist")
            continue
        missing = [name for name in names if name not in _names(node)]
        if missing:
            problems.append(f"{file}: {symbol} has no {', '.join(missing)}")
    return problems


@cache
def _module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(path: Path, symbol: str) -> ast.AST | None:
    node: ast.AST = _module(path)
    for part in symbol.split("."):
        found = None
        for child in ast.walk(node) if isinstance(node, ast.Module) else ast.iter_child_nodes(node):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if named and child.name == part:  # type: ignore[attr-defined]
                found = child
                break
        if found is None:
            return None
        node = found
    return node


def _names(node: ast.AST) -> set[str]:
    """Parameters of a function, or fields, members and methods of a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        every = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
        return {argument.arg for argument in every}
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            names.add(child.target.id)
        elif isinstance(child, ast.Assign):
            names |= {t.id for t in child.targets if isinstance(t, ast.Name)}
        elif isinstance(child, ast.FunctionDef):
            names.add(child.name)
    return names


def main(arguments: list[str] | None = None) -> int:
    """Check unpacked vLLM packages; returns the number of those that do not fit."""
    folders = [Path(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    failed = 0
    for folder in folders:
        package = folder / "vllm" if (folder / "vllm").is_dir() else folder
        problems = broken_symbols(package)
        failed += bool(problems)
        print(f"{folder}: {'fits' if not problems else 'does not fit'}")
        for problem in problems:
            print(f"  {problem}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
