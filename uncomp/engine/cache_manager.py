"""vLLM's block accounting for requests whose prefix was compacted away.

``CompressedSpec`` is vLLM's full-attention spec under another type, so that vLLM's own registry
hands the group to ``CompressedManager``. That manager differs from vLLM's in three points:

* blocks written after a compaction are never hashed: their content is no longer a function of the
  token prefix;
* a prefix hit leaves at least ``query_window`` tokens to compute, whose queries score the prompt
  (or its part, :class:`HashesBelow`);
* it can exchange and release blocks of a request's row on behalf of the planner.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request


@dataclass(frozen=True, kw_only=True)
class CompressedSpec(FullAttentionSpec):
    """Full attention whose prefix may be compacted.

    Attributes:
        query_window: queries that must be computed, not taken from the prefix cache, before a
            request can be compacted.
    """

    query_window: int = 0

    @classmethod
    def of(cls, spec: FullAttentionSpec, query_window: int) -> CompressedSpec:
        given = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(**given, query_window=query_window)

    @classmethod
    def merge(cls, specs: list[Any]) -> CompressedSpec:
        windows = {spec.query_window for spec in specs}
        if len(windows) != 1:
            raise ValueError(f"layers of one group disagree on the query window: {windows}")
        merged = FullAttentionSpec.merge.__func__(FullAttentionSpec, specs)  # type: ignore[attr-defined]
        return cls.of(merged, windows.pop())


class HashesBelow(list[Any]):
    """A request's block hashes, of which only those of its first ``limit`` tokens can be hits.

    What follows a compaction in the middle of a prompt must not be taken from requests that read
    it with the full cache.
    """

    def __init__(self, hashes: Sequence[Any], limit: int) -> None:
        super().__init__(hashes)
        self.limit = limit


class Unshared(HashesBelow):
    """Block hashes of a request whose prompt is pruned: it neither takes blocks of others nor
    leaves any, because in later layers they hold other tokens' keys and values.
    """

    def __init__(self, hashes: Sequence[Any]) -> None:
        super().__init__(hashes, 0)


class CompressedManager(FullAttentionManager):
    """Block manager of :class:`CompressedSpec` groups."""

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        #: request id → leading blocks of its row that are (or will be) given back
        self.compacted: dict[str, int] = {}

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> Any:
        spec = kwargs.get("kv_cache_spec")
        if spec is None:
            bound = inspect.signature(super().find_longest_cache_hit).bind(
                block_hashes, max_length, *args, **kwargs
            )
            spec = bound.arguments["kv_cache_spec"]
        if isinstance(block_hashes, HashesBelow):
            max_length = min(max_length, block_hashes.limit - 1)
        # vLLM asks for at most num_tokens - 1 cached tokens, so that one query is computed.
        max_length = max(0, max_length - max(spec.query_window - 1, 0))
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if request.request_id not in self.compacted and not isinstance(
            request.block_hashes, Unshared
        ):
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.compacted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def free(self, request_id: str) -> None:
        # Older versions do not route free() through pop_blocks_for_free().
        self.compacted.pop(request_id, None)
        super().free(request_id)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        # Cascade attention would read the shared prefix of rows whose prefix is gone. (Older vLLM
        # only: 0.32 has neither cascade attention nor this method.)
        inherited = getattr(super(), "get_num_common_prefix_blocks", None)
        return 0 if self.compacted or inherited is None else inherited(running_request_id)

    def make_private(
        self, request_id: str, first: int, last: int, fresh: bool = False
    ) -> tuple[int, ...] | None:
        """Make blocks ``[first, last)`` of a request's row its own, to be written over.

        Unshared blocks lose their hash; a block that another request holds is exchanged for a new
        one (its old content is still read this step: it cannot be reallocated before the next).

        Args:
            fresh: exchange all of them, for ones that hold nothing of the request.

        Returns:
            The ids, or ``None`` if the pool has too few free blocks; nothing is changed then.
        """
        row = self.req_to_blocks[request_id]
        changed = [i for i in range(first, last) if fresh or row[i].ref_cnt > 1]
        if len(changed) > self.block_pool.get_num_free_blocks():
            return None
        replaced = [row[i] for i in changed]
        new = self.block_pool.get_new_blocks(len(changed)) if changed else []
        for i, block in zip(changed, new, strict=True):
            row[i] = block
        self._release(replaced)
        self.block_pool.evict_blocks({row[i].block_id for i in range(first, last)})
        return tuple(row[i].block_id for i in range(first, last))

    def release_prefix(self, request_id: str, last: int) -> int:
        """Give blocks ``[0, last)`` of a request's row back to the pool.

        Returns:
            How many blocks went back (null blocks of an earlier compaction do not count).
        """
        row = self.req_to_blocks[request_id]
        freed = []
        for i in range(last - 1, -1, -1):
            if row[i].is_null:
                break
            freed.append(row[i])
            row[i] = self._null_block
        self._release(freed)
        return len(freed)

    def held_blocks(self, request_id: str) -> int:
        """Real blocks in a request's row."""
        return sum(not block.is_null for block in self.req_to_blocks.get(request_id, ()))

    def _release(self, blocks: Sequence[KVCacheBlock]) -> None:
        pool: BlockPool = self.block_pool
        # Tail first, as vLLM does: a hashed prefix stays reusable until the pool needs it.
        pool.free_blocks(list(blocks))


# The registry fills itself with vLLM's own specs only while it is empty: let it do so first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    CompressedSpec, manager_class=CompressedManager, uniform_type_base_spec=FullAttentionSpec
)
