"""Which model it was."""

from pathlib import Path

from uncomp.eval.engines.identity import identity


def test_a_hub_model_is_its_name_and_revision() -> None:
    assert identity("org/m", "abc") == {"model": "org/m", "revision": "abc"}


def test_a_folder_is_its_name_and_its_weights(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "m", tmp_path / "two" / "m", tmp_path / "three" / "m"]
    for folder, weights in zip(folders, (b"abc", b"abc", b"abd"), strict=True):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights)
    one, two, three = (identity(str(folder), None) for folder in folders)
    assert one == two
    assert one["model"] == "m"
    # SHA-256 of "abc", FIPS 180-2
    assert one["revision"].endswith(
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert three["revision"] != one["revision"]
