"""uncomp's numbers on vLLM's ``/metrics``: read from the engine's counter file at every scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from uncomp import envs
from uncomp.engine.counters import KEPT_RATIO_BUCKETS, REFUSALS, Counters, open_counters

_LABELS = ("model_name", "engine")  # as vLLM's own metrics
_COUNTERS = {
    "requests_compressed": "Requests whose KV cache was compacted at least once.",
    "compactions": "Compactions run.",
    "tokens_seen": "Cached tokens before compaction, summed over layers and KV heads.",
    "tokens_kept": "Cached tokens after compaction, summed over layers and KV heads.",
    "blocks_freed": "KV blocks given back to vLLM's pool by compactions.",
    "score_seconds": "Seconds spent choosing the tokens that stay.",
    "move_seconds": "Seconds spent moving them.",
    "prompts_pruned": "Prompts whose tokens did not all enter every layer.",
    "prefill_token_layers": "Tokens times layers of these prompts.",
    "prefill_token_layers_read": "The same, of tokens that entered their layer.",
    "choose_seconds": "Seconds spent choosing the tokens of these prompts that go on.",
}


class UncompCollector(Collector):
    """Counters of the engines that this process serves or started."""

    def __init__(self) -> None:
        #: vLLM's instance id -> served model name
        self.engines: dict[str, str] = {}

    def describe(self) -> Iterable[Metric]:
        return self._families([])

    def collect(self) -> Iterable[Metric]:
        found = []
        for instance_id, model in self.engines.items():
            for counters in _readable(instance_id):
                found.append(((model, str(counters.rank)), counters.snapshot()))
        return self._families(found)

    def _families(self, found: list[tuple[tuple[str, str], dict[str, float]]]) -> Iterator[Metric]:
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"uncomp:{name}", text, labels=_LABELS)
            for labels, values in found:
                counter.add_metric(labels, values[name])
            yield counter
        refusals = CounterMetricFamily(
            "uncomp:refusals",
            "Requests (no_free_block: attempts) that were not compressed, by reason.",
            labels=(*_LABELS, "reason"),
        )
        blocks = GaugeMetricFamily(
            "uncomp:kv_blocks_held", "KV blocks in use by requests.", labels=_LABELS
        )
        size = GaugeMetricFamily(
            "uncomp:kv_bytes_held", "KV-cache bytes in use by requests.", labels=_LABELS
        )
        ratio = HistogramMetricFamily(
            "uncomp:kept_ratio", "Cached tokens after over before a compaction.", labels=_LABELS
        )
        for labels, values in found:
            for reason in REFUSALS:
                refusals.add_metric((*labels, reason), values[f"refused_{reason}"])
            blocks.add_metric(labels, values["blocks_held"])
            size.add_metric(labels, values["blocks_held"] * values["block_bytes"])
            buckets = [(str(b), values[f"kept_ratio_le_{b}"]) for b in KEPT_RATIO_BUCKETS]
            buckets.append(("+Inf", values["compactions"]))
            ratio.add_metric(labels, buckets, values["kept_ratio_sum"])
        yield from (refusals, blocks, size, ratio)


_collector = UncompCollector()


def watch(vllm_config: Any) -> None:
    """Show the counters of this configuration's engine on ``/metrics`` of this process."""
    parallel = vllm_config.parallel_config
    instance_id = vllm_config.instance_id
    # With several API servers each builds a configuration of its own, with another id than the
    # engine's, which their parent (rank -1) has built.
    if parallel._api_process_rank == -1:
        envs.publish_instance(instance_id)
    elif parallel._api_process_count > 1:
        instance_id = envs.published_instance() or instance_id
    served = vllm_config.model_config.served_model_name
    if not _collector.engines:
        REGISTRY.register(_collector)
    _collector.engines[instance_id] = served if isinstance(served, str) else str(served)


def serve_shared(app: Any) -> None:
    """Answer ``/metrics`` of one of several API servers: all of their metrics, and ours."""
    if not envs.prometheus_shared():
        return
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    registry.register(_collector)

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.router.routes.insert(0, Route("/metrics", metrics))  # before vLLM's


def _readable(instance_id: str) -> list[Counters]:
    try:
        return open_counters(instance_id)
    except OSError:  # the engine has just ended
        return []
