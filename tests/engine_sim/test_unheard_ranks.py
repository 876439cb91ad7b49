"""A rank whose errors vLLM does not hear ends itself; the others raise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from uncomp.engine.orders import ATTRIBUTE, StepPlan
from uncomp.engine.worker import CompactingCPUWorker


class Disagreeing:
    """A seat that finds that scheduler and worker disagree."""

    def begin(self, plan: Any, gone: Any) -> None:
        raise RuntimeError("uncomp: the scheduler says ...")


def worker(rank: int, tensor: int, pipeline: int, executor: str) -> CompactingCPUWorker:
    parallel = SimpleNamespace(
        tensor_parallel_size=tensor,
        world_size=tensor * pipeline,
        distributed_executor_backend=executor,
    )
    made = object.__new__(CompactingCPUWorker)
    made.rank = rank
    made.vllm_config = SimpleNamespace(parallel_config=parallel)  # type: ignore[assignment]
    made._seat = Disagreeing()  # type: ignore[assignment]
    return made


def step() -> Any:
    output = SimpleNamespace(
        finished_req_ids=(),
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        preempted_req_ids=None,
        scheduled_new_reqs=(),
    )
    setattr(output, ATTRIBUTE, StepPlan())
    return output


@pytest.mark.parametrize(
    ("rank", "tensor", "pipeline", "executor", "heard"),
    [
        (0, 1, 1, "uni", True),
        (0, 2, 1, "mp", True),
        (1, 2, 1, "mp", False),
        (0, 1, 2, "mp", False),
        (1, 1, 2, "mp", True),
        (2, 2, 2, "mp", True),
        (3, 2, 2, "mp", False),
    ],
)
def test_errors_end_the_engine(
    rank: int, tensor: int, pipeline: int, executor: str, heard: bool
) -> None:
    error = RuntimeError if heard else SystemExit
    with pytest.raises(error):
        worker(rank, tensor, pipeline, executor).execute_model(step())
