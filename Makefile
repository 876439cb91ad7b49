# The developer's interface. Needed beforehand: Python 3.10 or newer and a C++ compiler.
# An active environment that has vLLM is used; otherwise .venv is made. Another: make test VENV=path

VENV ?= $(if $(and $(VIRTUAL_ENV),$(wildcard $(VIRTUAL_ENV)/lib/python3*/site-packages/vllm)),$(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
ARGS ?=
# test files that run side by side; they share the cores
JOBS ?= 2

# The root must stay off sys.path: its folder kernels/ would shadow the PyPI package of that name.
export PYTHONSAFEPATH = 1

.PHONY: demo test lint types format bench contract install

demo: install ## compressed and uncompressed answers of a small real model, side by side
	$(BIN)/uncomp demo $(ARGS)

test: install ## the whole test suite; a part of it: make test ARGS='tests/packaging -x'
	$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	scripts/types.sh $(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## throughput, memory and overhead on the engine: minutes
	$(BIN)/python -m uncomp.eval.bench $(ARGS)

contract: install ## the vLLM symbols we rely on, in every supported version: downloads 700 MB
	scripts/contract.sh $(BIN)/python $(ARGS)

install:
	@scripts/install.sh $(VENV)
