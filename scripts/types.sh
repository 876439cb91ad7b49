#!/usr/bin/env bash
# Type-check the package in its installed layout: mypy does not follow the mapping of an editable
# install, so kernels/, patches/ and eval/ are linked to where they are imported from.
set -euo pipefail
mypy=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
view=build/types
rm -rf "$view"
mkdir -p "$view/uncomp"
ln -s "$PWD"/uncomp/* "$PWD/kernels" "$PWD/patches" "$PWD/eval" "$view/uncomp/"
cache=$PWD/.mypy_cache
cd "$view"
"$mypy" --config-file ../../pyproject.toml --cache-dir "$cache"
