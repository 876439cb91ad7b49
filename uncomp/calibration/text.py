"""Real text for calibration: where it comes from and which windows of it are read."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from uncomp.calibration.file import CalibrationError

PACKAGED = ("moby_dick.txt", "state_of_the_union.txt")

# First guess for the length of a window; doubled when it holds too few tokens.
CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class Text:
    """A named text."""

    name: str
    content: str

    def record(self) -> dict[str, str]:
        """Name and sha256 (hex, of the UTF-8 bytes), as stored in the calibration file."""
        return {
            "name": self.name,
            "sha256": hashlib.sha256(self.content.encode()).hexdigest(),
        }


def default_texts() -> list[Text]:
    """The packaged public-domain texts and the language topics of the running Python."""
    folder = resources.files("uncomp.data")
    texts = [Text(name, (folder / name).read_text(encoding="utf-8")) for name in PACKAGED]
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave pydoc_data out; the record shows it
        return texts
    pages = [topics[name] for name in sorted(topics)]
    return [*texts, Text("pydoc_data.topics", "\n\n".join(pages))]


def read_texts(paths: Sequence[str | Path]) -> list[Text]:
    """The given UTF-8 files, or the default texts when there are none."""
    if not paths:
        return default_texts()
    texts = []
    for path in map(Path, paths):
        try:
            texts.append(Text(path.name, path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(
                f"cannot read text {path}: {error}; --text takes UTF-8 text files"
            ) from error
    return texts


def windows(
    texts: Sequence[Text],
    tokenize: Callable[[str], list[int]],
    samples: int,
    tokens: int,
    seed: int,
) -> Iterator[list[int]]:
    """Yield `samples` windows of exactly `tokens` token ids.

    The texts take turns, so each domain has an equal share; the character offset within a text is
    random; from there the text is tokenised and cut (as in the method's official search script).
    `tokenize` adds what the tokenizer adds on its own (a BOS token, for some models).

    Raises:
        CalibrationError: a text is too short for one window.
    """
    generator = random.Random(seed)
    for sample in range(samples):
        yield _window(texts[sample % len(texts)], tokenize, tokens, generator)


def _window(
    text: Text, tokenize: Callable[[str], list[int]], tokens: int, generator: random.Random
) -> list[int]:
    span = CHARACTERS_PER_TOKEN * tokens
    while True:
        span = min(span, len(text.content))
        offset = generator.randint(0, len(text.content) - span)
        # Start at a word: half a word is not text the model would see.
        start = text.content.find(" ", offset) + 1 if offset else 0
        ids = tokenize(text.content[start : offset + span])
        if len(ids) >= tokens:
            return ids[:tokens]
        if span == len(text.content):
            raise CalibrationError(
                f"text {text.name!r} has {len(ids)} tokens ({len(text.content)} characters), "
                f"a window needs {tokens}: give longer text with --text or lower --tokens"
            )
        span *= 2
