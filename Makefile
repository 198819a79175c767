# Each target does its own set-up, on a fresh machine too. `make demo` and `make test` are the two to know.

PYTHON ?= python3
# The tested version. On a machine with another accelerator: make test TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton>=3.6)
VENV ?= .venv
# What else to pin, as arguments of pip.
PINS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal -q

# Of `make bench`. Rows to commit: BENCH_OUT=bench/results.
BENCH_OUT ?= out

# `make gpu` runs from a bare checkout with what the machine has.
GPU_PYTHON ?= python3
OUT ?= bench/results
STAGE ?= headline

.PHONY: demo test test-all test-oldest test-gpu-stack test-newest lint docs compile asan levels abi bench gpu gpu-cache wheel \
	aot aot-gpu-stack clean

demo: $(READY)
	$(BIN)/mope demo --out out $(DEMO)

# Interpreted kernels run in a process of their own: Triton reads the variable when it is imported.
test: $(READY)
	$(PYTEST) -m "not slow" --durations 10
	TRITON_INTERPRET=1 $(PYTEST) tests/contract tests/kernels -k triton -m "not slow" --durations 10

# Everything: slow tests, shapes that no run has seen, and the oldest supported versions in an environment of their own.
test-all: $(READY) test-oldest
	MOPE_TEST_EVERYTHING=1 $(PYTEST) --durations 20
	MOPE_TEST_EVERYTHING=1 TRITON_INTERPRET=1 $(PYTEST) tests/contract tests/kernels -k triton --durations 20

# The oldest that are supported.
OLDEST := .venv-oldest
OF_OLDEST := VENV=$(OLDEST) TORCH=torch==2.11.0 TRITON=triton==3.6.0 PINS='"transformers==5.17.0" "numpy<2.4"'
test-oldest:
	$(MAKE) test $(OF_OLDEST)

# The versions of the machine that measures on a GPU: Python 3.12, whose libtriton.so is another file than that of 3.11.
GPU_STACK := .venv-gpu
GPU_STACK_PYTHON ?= $(shell PYENV_VERSION=3.12.1 pyenv which python3.12 2>/dev/null || echo python3.12)
OF_GPU_STACK := VENV=$(GPU_STACK) PYTHON=$(GPU_STACK_PYTHON) TORCH=torch==2.11.0 TRITON=triton==3.6.0 PINS='"transformers==5.17.0" "numpy==2.5.*"'
test-gpu-stack:
	$(MAKE) test $(OF_GPU_STACK)

# The newest that pip finds, torch with the Triton that it asks for. They stay as they are until the environment is removed.
NEWEST := .venv-newest
OF_NEWEST := VENV=$(NEWEST) TORCH=torch
test-newest:
	$(MAKE) test $(OF_NEWEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# The documentation as a site, with search and an API reference; a warning or a link that leads nowhere is an error.
docs: $(READY)
	$(BIN)/python docs/site/build.py out/site

# The short list of kernels, for the GPU that most have: no spills, and they fit.
compile: $(READY)
	$(BIN)/python -m mope_kernels.aot --arch sm_90 --short

# The C++ kernels, compiled into the file that follows; and that they are what runs.
COMPILE := -c "import sys; from pathlib import Path; from mope_kernels import build; build.compile_library(Path(sys.argv[1]))"
LOADED := -c "from mope_kernels._extension import STATUS; assert STATUS.loaded, STATUS.reason"

# The C++ kernels with AddressSanitizer and UndefinedBehaviorSanitizer, under the contract. Leaks of Python itself are not looked for.
SANITIZE := g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
asan: $(READY)
	CXX="$(SANITIZE)" $(BIN)/python $(COMPILE) build/asan/_C.so
	export MOPE_EXTENSION=build/asan/_C.so ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)"; \
	$(BIN)/python $(LOADED) && $(BIN)/python -m pytest -q tests/contract -k cpu -m "not slow"

# The contract with the C++ kernels for each set of instructions that is less than this processor's best, which `make test` takes.
levels: $(READY)
	for target in portable avx2 avx512; do \
	echo $$target && MOPE_CPU_TARGET=$$target $(PYTEST) tests/contract -k cpu -m "not slow" || exit 1; done

# One binary for every torch: what the oldest compiles passes the contract under the tested one, and the other way round.
abi: $(READY)
	$(MAKE) $(OLDEST)/.ready $(OF_OLDEST)
	$(BIN)/python $(COMPILE) build/abi/tested.so
	$(OLDEST)/bin/python $(COMPILE) build/abi/oldest.so
	export MOPE_EXTENSION=build/abi/oldest.so; $(BIN)/python $(LOADED) && $(PYTEST) tests/contract -k cpu -m "not slow"
	export MOPE_EXTENSION=build/abi/tested.so; $(OLDEST)/bin/python $(LOADED) && \
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q tests/contract -k cpu -m "not slow"

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.floor --out $(BENCH_OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.host --out $(BENCH_OUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench -q --show-capture=no --out $(BENCH_OUT)

gpu:
	OUT="$(OUT)" STAGE="$(STAGE)" $(GPU_PYTHON) -m bench.gpu

# What `make gpu` would compile, compiled here: with the versions of the machine that measures, or Triton finds nothing in it.
gpu-cache:
	$(MAKE) $(GPU_STACK)/.ready $(OF_GPU_STACK)
	$(GPU_STACK)/bin/python -m mope_kernels.aot --warm build/gpu-cache --arch sm_90 --launches bench.cache

wheel: $(READY)
	start=$$(date +%s); $(BIN)/python -m build --no-isolation --outdir dist && echo "built in $$(($$(date +%s) - start)) s"
	MOPE_BUILD_NATIVE=0 $(BIN)/python -m build --no-isolation --wheel --outdir dist/pure

# What the kernels take under the Triton that is installed, every feature once; SHORT= for each with each, which takes hours.
SHORT ?= --short
OF_TRITON := -c "import triton; print('.'.join(triton.__version__.split('.')[:2]))"
aot: $(READY)
	$(BIN)/python -m mope_kernels.aot --arch sm_80 sm_90 sm_100 gfx942 $(SHORT) $(AOT) --markdown \
	> docs/resources-triton-$$($(BIN)/python $(OF_TRITON)).md

aot-gpu-stack:
	$(MAKE) aot $(OF_GPU_STACK)

clean:
	rm -rf $(VENV) $(OLDEST) $(GPU_STACK) $(NEWEST) build dist out *.egg-info mope_kernels/_C.so

# torch goes first, alone: the extension is compiled against it, and nothing later may choose another.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install -q $(TORCH) $(addsuffix ",$(addprefix ",$(TRITON)))
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev,train,plot,bench,demo,docs]" $(PINS)
	touch $@
