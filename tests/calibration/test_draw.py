"""The picture exists, is a PNG of a sensible size, and survives odd shapes."""

import struct
from pathlib import Path

import pytest

from uncomp.calibration.file import CalibrationError

pytest.importorskip("matplotlib")

from uncomp.calibration.draw import Panel, draw


def panels(layers: int, heads: int) -> list[Panel]:
    entropy = [[0.5 + 0.01 * (layer + head) for head in range(heads)] for layer in range(layers)]
    group = [list(range(heads)) for _ in range(layers)]
    tokens = [[128.0] * heads for _ in range(layers)]  # constant: a colour scale of no width
    return [
        Panel("Entropy", "entropy", entropy, "viridis", "{:.2f}"),
        Panel("Group", "group", group, "YlGnBu", "{:.0f}", whole=True, top=heads - 1),
        Panel("Tokens", "tokens", tokens, "BuPu", "{:.0f}"),
    ]


@pytest.mark.parametrize(
    ("layers", "heads"), [(1, 1), (30, 3), (80, 8)], ids=["one head", "numbers", "no numbers"]
)
def test_png(tmp_path: Path, layers: int, heads: int) -> None:
    path = tmp_path / "heads.png"
    draw(path, "tiny", panels(layers, heads))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert 800 <= width <= 4000
    assert 400 <= height <= 4000


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot write"):
        draw(tmp_path / "missing" / "heads.png", "tiny", panels(2, 2))
