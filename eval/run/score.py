"""Third stage: from answers to numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from uncomp.eval.run.plan import PlanError
from uncomp.eval.run.predict import Key, key
from uncomp.eval.run.records import Case, Prediction, Scored
from uncomp.eval.run.store import Store
from uncomp.eval.tasks import scorers, teacher_forcing
from uncomp.eval.tasks.base import Sample

#: metrics of which less is better
LOWER = ("nll", "nll_increase", "kl")


def score(store: Store, samples: Sequence[Sample], say: Callable[[str], None]) -> list[Scored]:
    """Score the predictions of the run and write the scores.

    A run that is still going, or was stopped, is scored over the samples that have an answer of
    every case: comparisons are over the same samples then.

    Raises:
        PlanError: no sample has one, or a likelihood turn has no answer of the full cache.
    """
    left_out = unfinished(store.predictions(), samples)
    if left_out:
        say(f"{len(left_out)} of {len(samples)} samples have not been answered in full: left out")
    if len(left_out) == len(samples):
        raise PlanError(
            f"{store.folder}: no sample is answered in full yet; run the predict stage first"
        )
    by_name = {(sample.task, sample.id): sample for sample in samples}
    full: dict[Key, Prediction] = {}
    for prediction in store.predictions():
        if prediction.case.method == "full" and prediction.logprobs is not None:
            full[of_full(prediction)] = prediction
    token_bytes = _token_bytes(store)
    scores = []
    for prediction in store.predictions():
        if (prediction.task, prediction.sample) in left_out:
            continue
        # A token of another engine, with an FP8 cache, has other bytes.
        share = token_bytes.get(prediction.case.method, 1.0)
        for one in values(prediction, by_name[prediction.task, prediction.sample], full):
            kept = None if one.keep_measured is None else one.keep_measured * share
            scores.append(replace(one, keep_measured=kept))
    store.write_scores(scores)
    return scores


def unfinished(
    predictions: Iterable[Prediction], samples: Sequence[Sample]
) -> set[tuple[str, str]]:
    """Task and id of the samples without an answer of every case, to every turn."""
    answered: dict[tuple[str, str], set[tuple[int, Case]]] = {}
    for prediction in predictions:
        found = answered.setdefault((prediction.task, prediction.sample), set())
        found.add((prediction.turn, prediction.case))
    cases = {case for found in answered.values() for _, case in found}
    return {
        (sample.task, sample.id)
        for sample in samples
        if len(answered.get((sample.task, sample.id), ())) < len(sample.turns) * len(cases)
        or not cases
    }


def _token_bytes(store: Store) -> dict[str, float]:
    """Method -> bytes of one of its cached tokens over those of the full cache, if known."""
    known = {
        method: float(engine["kv_bytes_per_token"])
        for engine in store.facts().get("engines", ())
        if engine.get("kv_bytes_per_token")
        for method in engine["for"]
    }
    full = known.get("full")
    return {method: size / full for method, size in known.items()} if full else {}


def values(
    prediction: Prediction, sample: Sample, full: Mapping[Key, Prediction]
) -> Iterator[Scored]:
    """The numbers of one prediction; several for a likelihood turn.

    Args:
        full: predictions of the full cache by :func:`of_full`, for likelihood turns.

    Raises:
        PlanError: a likelihood turn has no answer of the full cache to be compared with.
    """
    turn = sample.turns[prediction.turn]
    one = Scored(
        task=prediction.task,
        sample=prediction.sample,
        turn=prediction.turn,
        case=prediction.case,
        metric=sample.metric,
        value=0.0,
        keep_measured=_keep(prediction),
        prompt_tokens=prediction.prompt_tokens,
        cut_tokens=prediction.cut_tokens,
        output_tokens=prediction.output_tokens,
        facts=sample.facts,
    )
    if prediction.logprobs is None:
        yield replace(one, value=scorers.score(sample.metric, prediction.text, turn, sample))
        return
    reference = full.get(of_full(prediction))
    if reference is None:
        raise PlanError(
            f"{prediction.task} {prediction.sample}: no answer of the full cache yet; run the "
            f"predict stage to its end first"
        )
    found = teacher_forcing.scored_values(
        teacher_forcing.from_json(reference.logprobs),
        teacher_forcing.from_json(prediction.logprobs),
        int(sample.facts.get("skip", 0)),
    )
    for metric, value in found.items():
        yield replace(one, metric=metric, value=value, higher_is_better=metric not in LOWER)


def of_full(prediction: Prediction) -> Key:
    """The same question under the full cache."""
    return key(prediction.task, prediction.sample, prediction.turn, Case("full"))


def _keep(prediction: Prediction) -> float | None:
    """Kept over full KV bytes as the engine measured them."""
    if prediction.case.method.startswith("full"):
        return 1.0
    if not prediction.seen_tokens:
        # No compaction ran: everything was kept, if the engine says so at all.
        return 1.0 if prediction.compactions == 0 else None
    return (prediction.kept_tokens or 0) / prediction.seen_tokens
