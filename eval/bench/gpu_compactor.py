"""The engine's own compaction, driven without an engine."""

from __future__ import annotations

import random

import torch

from uncomp.config import UncompConfig
from uncomp.engine.arena import LEAST_BYTES, Arena
from uncomp.engine.device_compactor import DeviceCompactor, Job
from uncomp.engine.device_state import DeviceRequests
from uncomp.engine.orders import Order
from uncomp.engine.settings import make_policy
from uncomp.eval.bench.gpu_cases import Case
from uncomp.importance import Pyramid
from uncomp.plan import Target
from uncomp.request import RequestSettings
from uncomp.spans import SENTENCE, WORD


def compactor(case: Case, config: UncompConfig, arena_bytes: int) -> DeviceCompactor:
    """A worker's compactor over the caches of a case; knows no compressed request.

    Where layers share, the last one gets most: a pyramid upside down.
    """
    shape, device, shared = case.shape, case.device, case.holdings.shared
    upside_down = Pyramid(tuple(range(shape.layers))[::-1], shape.heads, shape.layers)
    return DeviceCompactor(
        config,
        make_policy(config),
        case.caches,
        case.positions,
        list(range(shape.layers)),
        torch.full((shape.layers,), shape.size**-0.5, device=device),
        torch.zeros(shape.layers, device=device),
        DeviceRequests(shape.layers, shape.heads, 8, device, shared),
        Arena(arena_bytes, device),
        needs=upside_down if shared else None,
    )


def jobs(case: Case, config: UncompConfig, requests: list[int]) -> list[Job]:
    """First compactions of rows of a case at their length; random queries, words and sentences."""
    shape = case.shape
    settings = RequestSettings(True, config.keep, config.budget)
    target = Target.of(settings, config, shape.block)
    made = []
    for request in requests:
        tokens = int(case.rows.lengths[request])
        full, keep = tokens // shape.block, target.kept_blocks(tokens)
        blocks = tuple(case.rows.blocks[request, full - keep : full].tolist())
        queries = case.queries(shape.layers * config.window, seed=request)
        queries = queries.view(shape.layers, config.window, -1, shape.size)
        odd = random.Random(request)
        gaps = bytes(odd.choices((0, WORD, SENTENCE), (6, 12, 1), k=tokens))
        order = Order(name(request), tokens, full, blocks, 1, gaps=gaps)
        made.append(Job(order, request, queries))
    return made


def forget(compactor: DeviceCompactor, requests: list[int]) -> None:
    """The next compaction of these is a first one again."""
    for request in requests:
        compactor.requests.drop(name(request))


def name(request: int) -> str:
    return f"request-{request}"


def arena_bytes(device: torch.device) -> int:
    """What a worker of the engine takes at least."""
    return LEAST_BYTES if device.type == "cuda" else 8 << 20
