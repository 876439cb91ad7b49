"""InfiniteBench (Zhang et al., ACL 2024): the official rows, and its retrieval at any length.

The official rows hold 40,000 to 200,000 tokens and more. The retrieval tasks are synthetic, so the
tasks named ``..._generated`` make them from a seed at the wanted length: the same wording, other
keys, and never to be compared with published numbers.

Prompts, answer lengths and stop strings are lm-eval's task files. Left out for want of a metric:
code_run, math_calc, longbook_sum_eng and longbook_qa_chn.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from string import ascii_uppercase
from typing import Any

from uncomp.eval.tasks import hub, recipes
from uncomp.eval.tasks.base import Built, DataError, Sample, Task, Turn, Wanted
from uncomp.eval.tasks.fitting import fit

_DATA_SET = "xinrongzhang2022/InfiniteBench"
_REVISION = "90f0394333616266d9fe85824ceaf505093cbaa5"
_LICENCE = "MIT (code repository)"
_SOURCE = "Zhang et al. 2024, arXiv:2402.13718; prompts and settings of lm-eval"
_GENERATED = "synthetic (this package), wording of InfiniteBench (MIT)"


@dataclass(frozen=True)
class _Kind:
    """One official task: file, metric, what is asked, and the first words of the answer.

    The first words are those of InfiniteBench's own templates for open models; without them chat
    models spend the few answer tokens on repeating the question.
    """

    file: str
    metric: str
    about: str
    prefix: str = ""


_NUMBER_PREFIX = "\n\nThe sequence of digits is"
_KINDS = {
    kind.file: kind
    for kind in (
        _Kind("passkey", "number_match", "five digits hidden in noise", "\n\nThe pass key is"),
        _Kind("number_string", "number_match", "ten digits hidden in noise", _NUMBER_PREFIX),
        _Kind("kv_retrieval", "any_reference", "value of a key among pairs of UUIDs"),
        _Kind("longbook_qa_eng", "f1", "questions about a book"),
        _Kind("longbook_choice_eng", "choice", "multiple choice about a book"),
        _Kind("longdialogue_qa_eng", "any_reference", "masked speaker of a dialogue"),
        _Kind("code_debug", "choice", "which of four functions has an error"),
        _Kind("math_find", "number_match", "number with a property in a list"),
    )
}


def _recipe(kind: _Kind) -> recipes.Recipe:
    name = kind.file.replace("_eng", "_en")  # lm-eval's name
    return recipes.recipe("infinitebench", f"infinitebench_{name}.yaml")


def _build(kind: _Kind, wanted: Wanted) -> Built:
    """Official rows; those longer than the wanted length are kept, for the run to cut."""
    recipe = _recipe(kind)
    rows, data = hub.rows(_DATA_SET, f"{kind.file}.jsonl", _REVISION, wanted.data, licence=_LICENCE)
    hub.require(rows, ("context", "input", "answer"), data)
    chosen = hub.pick(list(enumerate(rows)), wanted.count, wanted.seed)
    samples = []
    for index, row in chosen:
        head, question = recipe.split(row)
        turn = Turn(question, _references(kind, row), recipe.max_tokens, kind.prefix, recipe.stop)
        samples.append(
            Sample(
                task=f"infinitebench/{kind.file}",
                id=str(row.get("id", index)),
                metric=kind.metric,
                context=row["context"],
                turns=(turn,),
                head=head,
                facts={"dataset": kind.file},
            )
        )
    recipes.require_room(samples, wanted)
    return Built(samples, (data, recipe.file))


def _references(kind: _Kind, row: Mapping[str, Any]) -> tuple[str, ...]:
    answer = row["answer"]
    answers = [str(one) for one in (answer if isinstance(answer, list) else [answer])]
    if kind.metric != "choice":
        return tuple(answers)
    options = [str(option).strip() for option in row.get("options") or ()]
    letters = [_letter(one, options) for one in answers if _letter(one, options)]
    if not letters:
        raise DataError(
            f"{kind.file}: the answer {answers} is neither a letter nor one of {options}"
        )
    return tuple(letters)


def _letter(answer: str, options: list[str]) -> str:
    """Letter of an option; the rows give its text."""
    answer = answer.strip()
    if answer in options:
        return ascii_uppercase[options.index(answer)]
    return answer if len(answer) == 1 and answer in ascii_uppercase else ""


# The next strings are InfiniteBench's (data/construct_synthetic_dataset.py, MIT), which has them
# from Mohtashami and Jaggi 2023 and, for the pairs, from Liu et al. 2023.
_NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_HIDDEN = {
    "passkey": "The pass key is {key}. Remember it. {key} is the pass key.\n",
    "number_string": (
        "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
    ),
}
_QUESTION = {
    "passkey": "What is the pass key?",
    "number_string": "What is the sequence of digits?",
    "kv_retrieval": '\nKey: "{key}"\nThe value associated with the specified key is: ',
}


def _passkey(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(5))


def _number_string(rng: random.Random) -> str:
    """Five digits, then five times one of the digits is doubled where it stands."""
    digits = list(_passkey(rng))
    for _ in range(5):
        at = rng.randrange(len(digits))
        digits.insert(at, digits[at])
    return "".join(digits)


def _hidden_in_noise(kind: _Kind, rng: random.Random, depth: float) -> Callable[[int], dict]:
    """Rows of so many lines of noise, as in InfiniteBench."""
    key = {"passkey": _passkey, "number_string": _number_string}[kind.file](rng)
    hidden = _HIDDEN[kind.file].format(key=key)

    def row(lines: int) -> dict[str, Any]:
        before = round(depth * lines)
        context = _NOISE * before + hidden + _NOISE * (lines - before)
        return {"context": context, "input": _QUESTION[kind.file], "answer": key}

    return row


def _pairs(kind: _Kind, rng: random.Random, depth: float) -> Callable[[int], dict]:
    """Rows of so many pairs of UUIDs, as in InfiniteBench."""
    made: list[tuple[str, str]] = []

    def new_uuid() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def row(pairs: int) -> dict[str, Any]:
        while len(made) < pairs:
            made.append((new_uuid(), new_uuid()))
        key, value = made[round(depth * (pairs - 1))]
        inside = ", ".join(f'"{k}": "{v}"' for k, v in made[:pairs])
        question = _QUESTION[kind.file].format(key=key)
        return {"context": f"JSON data:\n{{{inside}}}", "input": question, "answer": value}

    return row


def _generate(kind: _Kind, wanted: Wanted) -> Built:
    """Samples of the wanted length, the answer at depths spread evenly over 0 to 1."""
    recipe = _recipe(kind)
    maker = _pairs if kind.file == "kv_retrieval" else _hidden_in_noise
    samples = []
    units = max(1, wanted.length // (80 if kind.file == "kv_retrieval" else 25))
    for index in range(wanted.count):
        depth = index / (wanted.count - 1) if wanted.count > 1 else 0.5
        row = maker(kind, random.Random(f"{kind.file} {wanted.seed} {index}"), depth)
        make = partial(_generated_sample, kind, recipe, row, index, depth)
        units, sample = fit(make, wanted.tokenizer, wanted.length, most=wanted.length, start=units)
        samples.append(sample)
    return Built(samples, (recipe.file,))


def _generated_sample(
    kind: _Kind,
    recipe: recipes.Recipe,
    row: Callable[[int], dict[str, Any]],
    index: int,
    depth: float,
    units: int,
) -> Sample:
    made = row(units)
    head, question = recipe.split(made)
    turn = Turn(question, (made["answer"],), recipe.max_tokens, kind.prefix, recipe.stop)
    return Sample(
        task=f"infinitebench/{kind.file}_generated",
        id=str(index),
        metric=kind.metric,
        context=made["context"],
        turns=(turn,),
        head=head,
        facts={"depth": round(depth, 4), "units": units},
    )


TASKS: tuple[Task, ...] = (
    *(
        Task(
            f"infinitebench/{kind.file}",
            f"{kind.about} (official rows, 40K to 200K tokens)",
            _SOURCE,
            _LICENCE,
            partial(_build, kind),
        )
        for kind in _KINDS.values()
    ),
    *(
        Task(
            f"infinitebench/{name}_generated",
            f"{_KINDS[name].about} (made here for the wanted length)",
            _SOURCE,
            _GENERATED,
            partial(_generate, _KINDS[name]),
        )
        for name in ("passkey", "number_string", "kv_retrieval")
    ),
)
