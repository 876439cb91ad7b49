"""Key-value retrieval: the value of one key in a JSON object of random UUIDs.

Source: Liu et al., "Lost in the Middle: How Language Models Use Long Contexts", 2023 (arXiv
2307.03172), section 3. Nothing can be answered from what a model knows, and nothing in the text
hints at which pair matters. The pair asked for is at evenly spaced depths.
"""

from __future__ import annotations

import random
import uuid
from functools import partial

from uncomp.eval.tasks.base import Built, Sample, Task, Turn, Wanted
from uncomp.eval.tasks.fitting import fit
from uncomp.eval.tasks.needle import depths

NAME = "kv_retrieval"
_HEAD = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
)
_PREFIX = "\nCorresponding value:"
_MAX_TOKENS = 48  # a UUID and quotation marks, of which some tokenizers make a token a character
_PAIR = 50  # tokens, about; where the search starts


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _sample(depth: float, index: int, wanted: Wanted, units: int) -> Sample:
    """So many pairs, the asked one at a depth."""
    draw = random.Random(f"{wanted.seed} {index}")
    pairs = [(_uuid(draw), _uuid(draw)) for _ in range(units)]
    key, value = pairs[round(depth * (units - 1))]
    return Sample(
        task=NAME,
        id=f"{wanted.length}-{wanted.seed}-{index}",
        metric="contains",
        head=_HEAD,
        context="{" + ",\n ".join(f'"{name}": "{its}"' for name, its in pairs) + "}",
        turns=(Turn(f'\n\nKey: "{key}"', (value,), _MAX_TOKENS, _PREFIX),),
        facts={"length": wanted.length, "depth": round(depth, 4), "pairs": units},
    )


def _build(wanted: Wanted) -> Built:
    samples = []
    units = wanted.length // _PAIR
    for index, depth in enumerate(depths(wanted.count)):
        units, sample = fit(
            partial(_sample, depth, index, wanted),
            wanted.tokenizer,
            wanted.length,
            least=2,
            most=wanted.length,
            start=units,
        )
        samples.append(sample)
    return Built(samples)


TASKS: tuple[Task, ...] = (
    Task(
        name=NAME,
        about="the value of a key among pairs of UUIDs, at evenly spaced depths",
        source="Liu et al. 2023, arXiv 2307.03172; generated here",
        licence="generated",
        build=_build,
    ),
)
