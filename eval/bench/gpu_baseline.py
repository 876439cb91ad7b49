"""What decode attention on uncompressed rows is compared with: the best FlashAttention at hand."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uncomp.eval.bench.gpu_cases import FP8, Case, fill_normal
from uncomp.eval.bench.gpu_timing import Work

#: tokens of a page that every version of flash_attn takes
PAGE = 256


@dataclass(frozen=True)
class Baseline:
    """A kernel. Attributes: paged: whether it reads through a block table as vLLM does."""

    name: str
    paged: bool
    work: Work


def flash(case: Case, query: Tensor) -> Baseline:
    """Attention of the first layer of a case with plain rows of equal length.

    Args:
        query: `[rows, query heads, d]`.
    """
    if case.device.type == "cuda":
        if _has("vllm.vllm_flash_attn"):
            return _vllm(case, query)
        if _has("flash_attn"):
            return _package(case, query)
    return _torch(case, query)


def _has(module: str) -> bool:
    try:
        if importlib.util.find_spec(module) is None:
            return False
        importlib.import_module(module)
    except Exception:  # found, but not for this device or this torch
        return False
    return True


def _vllm(case: Case, query: Tensor) -> Baseline:
    """The call of vLLM's FlashAttention backend, on the same cache."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    shape, rows = case.shape, case.rows
    count = len(rows.lengths)
    version = get_flash_attn_version()
    keys, values = case.caches.tensors[0].transpose(1, 2).split(shape.size, dim=-1)
    scales: dict[str, Tensor] = {}
    out = torch.empty_like(query)
    if case.caches.dtype == FP8:
        query = query.to(FP8)
        for i, letter in enumerate("kv"):
            scales[f"{letter}_descale"] = case.caches.scales[0, i].expand(count, shape.heads)
        scales["q_descale"] = torch.ones_like(scales["k_descale"])
    arguments: dict[str, Any] = {
        "q": query,
        "k": keys,
        "v": values,
        "out": out,
        "cu_seqlens_q": torch.arange(count + 1, dtype=torch.int32, device=case.device),
        "max_seqlen_q": 1,
        "seqused_k": rows.lengths,
        "max_seqlen_k": int(rows.lengths.max()),
        "softmax_scale": shape.size**-0.5,
        "causal": True,
        "block_table": rows.blocks,
        "fa_version": version,
        **scales,
    }
    return Baseline(
        f"FlashAttention {version} of vLLM", True, lambda: flash_attn_varlen_func(**arguments)
    )


def _package(case: Case, query: Tensor) -> Baseline:
    """The flash_attn package, which wants larger pages: a cache of its own."""
    from flash_attn import flash_attn_with_kvcache

    shape, rows = case.shape, case.rows
    count, pages = len(rows.lengths), int(rows.lengths.max()) // PAGE
    size = (count * pages, PAGE, shape.heads, shape.size)
    keys, values = (torch.empty(size, dtype=query.dtype, device=case.device) for _ in range(2))
    fill_normal(keys, 1)
    fill_normal(values, 2)
    table = torch.randperm(count * pages, device=case.device).to(torch.int32).view(count, pages)
    asked = query[:, None]

    def work() -> object:
        return flash_attn_with_kvcache(
            asked, keys, values, cache_seqlens=rows.lengths, block_table=table, causal=True
        )

    return Baseline("flash_attn, bf16", True, work)


def _torch(case: Case, query: Tensor) -> Baseline:
    """Torch's flash kernel on dense keys and values.

    The query heads of a KV head are given as queries of one head: without a mask that is the same,
    and every key is read once.
    """
    shape, rows = case.shape, case.rows
    size = (len(rows.lengths), shape.heads, int(rows.lengths.max()), shape.size)
    keys, values = (torch.empty(size, dtype=query.dtype, device=case.device) for _ in range(2))
    fill_normal(keys, 1)
    fill_normal(values, 2)
    asked = query.view(len(rows.lengths), shape.heads, shape.group, shape.size)
    cuda = case.device.type == "cuda"

    def work() -> object:
        only = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if cuda else contextlib.nullcontext()
        with only:
            return F.scaled_dot_product_attention(asked, keys, values)

    return Baseline("torch's flash attention, dense bf16", False, work)
