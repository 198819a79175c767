# Each target does its own set-up, on a fresh machine too. `make demo` and `make test` are the two to know.

PYTHON ?= python3
# The tested version. On a machine with another accelerator: make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton>=3.6)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# `make gpu` runs from a bare checkout with what the machine has.
GPU_PYTHON ?= python3
OUT ?= bench/results
STAGE ?= tests,ops

.PHONY: demo test test-all lint bench gpu wheel aot clean

demo: $(READY)
	$(BIN)/mope demo --out out $(DEMO)

# Interpreted kernels run in a process of their own: Triton reads the variable when it is imported.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --durations 10 -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -k triton -n 2 -m "not slow" --durations 10 -q

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 20 -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -k triton -n 2 --durations 20 -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	mkdir -p out
	$(BIN)/python -m pytest bench -q --benchmark-json=out/benchmark.json

gpu:
	OUT="$(OUT)" STAGE="$(STAGE)" $(GPU_PYTHON) -m bench.gpu

wheel: $(READY)
	$(BIN)/python -m build --no-isolation --outdir dist
	MOPE_BUILD_NATIVE=0 $(BIN)/python -m build --no-isolation --wheel --outdir dist/pure

aot: $(READY)
	$(BIN)/python -m mope_kernels.aot --arch sm_80 sm_90 sm_100 gfx942

clean:
	rm -rf $(VENV) build dist out *.egg-info mope_kernels/_C.so

# torch goes first, alone: the extension is compiled against it, and nothing later may choose another.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install -q $(TORCH) $(addsuffix ",$(addprefix ",$(TRITON)))
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev,train,plot,bench]"
	touch $@
