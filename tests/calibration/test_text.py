"""Windows of text: exact length, seeded, an equal share for each text, clear refusals."""

from pathlib import Path

import pytest

from uncomp.calibration.file import CalibrationError
from uncomp.calibration.text import PACKAGED, Text, default_texts, read_texts, windows


def tokenize(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_packaged_text_is_there() -> None:
    texts = default_texts()
    assert [text.name for text in texts[: len(PACKAGED)]] == list(PACKAGED)
    assert all(len(text.content) > 100_000 for text in texts)
    assert len({text.record()["sha256"] for text in texts}) == len(texts)


def test_windows_have_the_length_and_follow_the_seed() -> None:
    texts = default_texts()
    first, again, other = (list(windows(texts, tokenize, 5, 700, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [len(ids) for ids in first] == [700] * 5


def test_texts_take_turns() -> None:
    texts = [Text("ones", "a " * 5000), Text("twos", "bb " * 5000)]
    assert [ids[0] for ids in windows(texts, tokenize, 4, 100, 0)] == [1, 2, 1, 2]


def test_window_may_be_the_whole_text() -> None:
    (ids,) = windows([Text("all", "word " * 100)], tokenize, 1, 100, 0)
    assert len(ids) == 100


def test_window_grows_when_tokens_are_long() -> None:
    (ids,) = windows([Text("long", f"{'x' * 50} " * 200)], tokenize, 1, 100, 0)
    assert ids == [50] * 100


@pytest.mark.parametrize("content", ["", "too short a text"], ids=["empty", "short"])
def test_too_short(content: str) -> None:
    with pytest.raises(CalibrationError, match=r"'note.txt' has \d tokens .* a window needs 100"):
        list(windows([Text("note.txt", content)], tokenize, 1, 100, 0))


def test_user_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("ein Text", encoding="utf-8")
    assert read_texts([path]) == [Text("mine.txt", "ein Text")]
    with pytest.raises(CalibrationError, match=r"absent\.txt"):
        read_texts([tmp_path / "absent.txt"])
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CalibrationError, match="UTF-8"):
        read_texts([path])
