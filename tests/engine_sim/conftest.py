"""Shared by the simulation's tests; its modules are imported by name."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def simulated_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vLLM's CPU worker hands steps to its runner; counters are written to a temporary folder."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    def execute_model(self: CPUWorker, output: object) -> object:
        return self.model_runner.execute_model(output)

    def sample_tokens(self: CPUWorker, grammar_output: object) -> object:
        return self.model_runner.sample_tokens(grammar_output)

    monkeypatch.setattr(CPUWorker, "execute_model", execute_model)
    monkeypatch.setattr(CPUWorker, "sample_tokens", sample_tokens)
    monkeypatch.setenv("UNCOMP_METRICS_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
