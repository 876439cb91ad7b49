"""The share of a calibration file that belongs to one worker."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from uncomp.calibration.file import Calibration, CalibrationError, load
from uncomp.calibration.plan import stage_starts
from uncomp.config import UncompConfig
from uncomp.importance import Needs, Pyramid
from uncomp.pruning import Schedule, parse_layers


def load_checked(config: UncompConfig, hf_config: Any) -> Calibration | None:
    """The calibration file of the settings, checked against the model; ``None`` without one.

    Raises:
        CalibrationError: missing or corrupt file, another model, or another truncation.
    """
    needs_importance = config.shares == "calibrated"
    is_read = config.uses_entropy or config.prefill_keep is not None or needs_importance
    if config.calibration is None or not is_read:
        return None
    calibration = load(config.calibration)
    calibration.check_model(hf_config)
    if needs_importance:
        try:
            calibration.head_importance()
        except CalibrationError as error:
            raise CalibrationError(f"calibration file {config.calibration}: {error}") from None
    if not config.uses_entropy:
        return calibration
    if config.truncation not in (None, calibration.truncation):
        raise CalibrationError(
            f"{config.calibration} holds entropies truncated at {calibration.truncation}, the "
            f"settings ask for truncation={config.truncation}: calibrate again or drop the setting"
        )
    return calibration


def shares_layers(config: UncompConfig) -> bool:
    """Whether the heads of all layers share one budget."""
    return config.shares != "policy"


def schedule_of(config: UncompConfig, hf_config: Any) -> Schedule | None:
    """Where prompt tokens leave; ``None`` if the settings prune no prompts.

    Without stages of the settings' own: those of the calibration file.

    Raises:
        ValueError: stages that the model does not have.
        CalibrationError: see :func:`load_checked`; also one whose entropies never fall.
    """
    if config.prefill_keep is None:
        return None
    layers = int(hf_config.num_hidden_layers)
    if config.prefill_stages is not None:
        return Schedule(parse_layers(config.prefill_stages), layers, config.prefill_floor)
    calibration = load_checked(config, hf_config)
    assert calibration is not None  # the settings were checked
    starts = stage_starts(calibration)
    if not starts:
        raise CalibrationError(
            f"the entropies in {config.calibration} fall from no layer to the next: set "
            f"prefill_stages to the first layers of the stages"
        )
    return Schedule(starts, layers, config.prefill_floor)


def rank_entropies(
    config: UncompConfig, vllm_config: Any, layer_indices: list[int], heads: int
) -> Tensor | None:
    """[layers, heads] float64 entropies of this rank's layers and KV heads, or ``None``.

    vLLM gives every tensor-parallel rank consecutive KV heads (copies, if there are fewer KV heads
    than ranks).
    """
    if not config.uses_entropy:
        return None
    calibration = load_checked(config, vllm_config.model_config.hf_text_config)
    if calibration is None:
        return None
    table = calibration.scores(config.source, config.measure)
    return table[layer_indices, _heads_of_rank(vllm_config, table.shape[1], heads)]


def rank_needs(
    config: UncompConfig, vllm_config: Any, layer_indices: list[int], heads: int
) -> Needs | None:
    """What this rank's layers and KV heads need; ``None`` if layers do not share."""
    if not shares_layers(config):
        return None
    text = vllm_config.model_config.hf_text_config
    if config.shares == "pyramid":
        return Pyramid(tuple(layer_indices), heads, int(text.num_hidden_layers))
    calibration = load_checked(config, text)
    assert calibration is not None  # the settings were checked
    importance = calibration.head_importance()
    of_rank = _heads_of_rank(vllm_config, importance.shares.shape[2], heads)
    return importance.part(layer_indices, of_rank)


def _heads_of_rank(vllm_config: Any, all_heads: int, heads: int) -> slice:
    parallel = vllm_config.parallel_config
    rank = parallel.rank % parallel.tensor_parallel_size
    first = rank * all_heads // parallel.tensor_parallel_size
    return slice(first, first + heads)
