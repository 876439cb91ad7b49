"""Second stage: ask the engine, every question under every case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uncomp.eval.engines.base import Answer, Ask, Engine, EngineError
from uncomp.eval.methods import Method, cases
from uncomp.eval.run.plan import Plan
from uncomp.eval.run.prompts import Prompt, Renderer
from uncomp.eval.run.records import Case, Prediction
from uncomp.eval.run.store import Store
from uncomp.eval.tasks.base import Sample
from uncomp.eval.tasks.teacher_forcing import to_json

Key = tuple[str, str, int, str, float]


@dataclass(frozen=True)
class Question:
    """One turn of one sample under one case."""

    sample: Sample
    turn: int
    case: Case
    prompt: Prompt

    @property
    def key(self) -> Key:
        return key(self.sample.task, self.sample.id, self.turn, self.case)


def key(task: str, sample: str, turn: int, case: Case) -> Key:
    """What makes a prediction the answer to a question."""
    return task, sample, turn, case.method, case.keep


def predict(
    store: Store,
    samples: Sequence[Sample],
    methods: Sequence[Method],
    engine: Engine,
    advance: Callable[[int, int], None],
    wanted: Sequence[Case] | None = None,
) -> int:
    """Answer what is not answered yet.

    Args:
        methods: those that this engine can serve.
        advance: told how many answers are there and how many there will be.
        wanted: cases of these methods; default: each at all keep ratios of the plan.

    Returns:
        Answers made now.

    Raises:
        EngineError: the engine cannot do what is asked, refused a request or died. What was
            answered before is on disk.
    """
    if not engine.compresses and any(not method.full for method in methods):
        raise EngineError(
            "this server runs without uncomp, so only the full cache can be evaluated: start it "
            "with `uncomp serve MODEL --kv-keep 1.0`, or ask for no other methods (--methods full)"
        )
    by_name = {method.name: method for method in methods}
    renderer = Renderer(engine.tokenizer, engine.max_model_len, store.plan.chat)
    wanted = cases(methods, store.plan.keeps) if wanted is None else wanted
    done = {key(p.task, p.sample, p.turn, p.case) for p in store.predictions()}
    groups, questions = _groups(samples, wanted, renderer, done, by_name, store.plan)
    total = sum(len(sample.turns) for sample in samples) * len(wanted)
    there = total - len(questions)
    advance(there, total)
    with store.predicting() as file:
        for answer in engine.answer(groups):
            file.add(_prediction(questions[answer.key], answer))
            there += 1
            advance(there, total)
    return len(questions)


def _groups(
    samples: Sequence[Sample],
    wanted: Sequence[Case],
    renderer: Renderer,
    done: set[Key],
    methods: Mapping[str, Method],
    plan: Plan,
) -> tuple[list[list[Ask]], dict[str, Question]]:
    """Requests by prompt, and which question each of them is."""
    groups: list[list[Ask]] = []
    questions: dict[str, Question] = {}
    for sample in samples:
        for turn in range(len(sample.turns)):
            left = [c for c in wanted if key(sample.task, sample.id, turn, c) not in done]
            if not left:
                continue
            prompt = renderer.prompt(sample, turn)
            group = []
            for case in left:
                name = f"{sample.task}:{sample.id}:{turn}:{case.method}:{case.keep}"
                questions[name] = Question(sample, turn, case, prompt)
                group.append(_ask(name, questions[name], methods[case.method], plan))
            groups.append(group)
    return groups, questions


def _ask(name: str, question: Question, method: Method, plan: Plan) -> Ask:
    turn = question.sample.turns[question.turn]
    extra = method.request(question.case.keep)
    if plan.query_agnostic and not method.full and question.prompt.context_end:
        extra["kv_compact_at"] = question.prompt.context_end
    return Ask(
        name,
        question.prompt.ids,
        turn.max_tokens,
        extra,
        turn.stop,
        question.prompt.forced,
        plan.top_logprobs if question.prompt.forced else 0,
    )


def _prediction(question: Question, answer: Answer) -> Prediction:
    kept: Mapping[str, Any] = answer.kept or {}
    return Prediction(
        task=question.sample.task,
        sample=question.sample.id,
        turn=question.turn,
        case=question.case,
        text="" if question.prompt.forced else answer.text,
        prompt_tokens=len(question.prompt.ids),
        cut_tokens=question.prompt.cut,
        output_tokens=answer.tokens,
        kept_tokens=kept.get("kept_tokens"),
        seen_tokens=kept.get("full_tokens"),
        compactions=kept.get("compactions"),
        seconds=round(answer.seconds, 4),
        finish=answer.finish,
        logprobs=to_json(answer.records) if answer.records else None,
    )


def pending(store: Store, samples: Sequence[Sample], methods: Sequence[Method]) -> Iterator[Key]:
    """Questions without an answer; an engine need not be started when there are none."""
    done = {key(p.task, p.sample, p.turn, p.case) for p in store.predictions()}
    for sample in samples:
        for turn in range(len(sample.turns)):
            for case in cases(methods, store.plan.keeps):
                wanted = key(sample.task, sample.id, turn, case)
                if wanted not in done:
                    yield wanted
