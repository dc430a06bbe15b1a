# make demo | test | test-full | lint | bench | wheel | clean. Everything runs in .venv, which the first target
# that needs it creates. Steps leave stamps there, so a second run does only what changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# The tested torch, from the configured index. Where that index offers only the build with CUDA
# (gigabytes), install a CPU build into .venv first: a torch that is there is kept.
TORCH := 2.13.0
BUDGET_MIN := 40
PYTEST_ARGS ?= -n auto

NATIVE := $(wildcard csrc/*.h csrc/*.cpp templates/common/*.h) setup.py
FORMATTED := csrc/*.h csrc/*.cpp templates/*/*.h templates/*/*.cuh tests/cpp/*.h tests/cpp/*.cpp \
  tests/unit/*.cpp tests/ptxsim/*.h tests/ptxsim/*.cpp
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test test-full lint bench wheel clean cpp-tests python-tests
demo: $(STAMPS)/installed
	$(BIN)/attnengine demo

test:
	@echo "make test: budget $(BUDGET_MIN) minutes on 2 cores, from a clean checkout, after downloads"
	@start=$$SECONDS; \
	$(MAKE) --no-print-directory $(STAMPS)/installed; \
	$(MAKE) --no-print-directory lint; \
	$(MAKE) --no-print-directory cpp-tests; \
	$(MAKE) --no-print-directory python-tests; \
	spent=$$((SECONDS - start)); \
	echo "make test: passed in $$((spent / 60)) min $$((spent % 60)) s of $(BUDGET_MIN) min"; \
	if ((spent > $(BUDGET_MIN) * 60)); then echo "make test: over its budget"; fi

# The CUDA kernels that `make test` leaves out: every combination of row function, mask and score_mod.
test-full: test
	$(BIN)/python -m tests.simulated --full --record
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/numerics/test_cuda_decode.py --orders 3

cpp-tests: $(STAMPS)/installed
	cmake -S . -B build/cpp -G Ninja
	cmake --build build/cpp
	ctest --test-dir build/cpp --output-on-failure

python-tests: $(STAMPS)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMPS)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

bench: $(STAMPS)/installed
	$(BIN)/python -m bench cpu --report

# Against a torch that is there: that of .venv, else PYTHON's. Only where neither has one is it fetched.
WHEEL := -m pip wheel --no-build-isolation --no-deps -w dist .
CAN_BUILD := import ninja, pybind11, setuptools, torch; \
  assert int(setuptools.__version__.split(".")[0]) >= 77
wheel:
	@for python in $(BIN)/python $(PYTHON); do \
	  if "$$python" -c '$(CAN_BUILD)' 2>/dev/null; then exec "$$python" $(WHEEL); fi; \
	done; \
	$(MAKE) --no-print-directory $(STAMPS)/build-tools; \
	exec $(BIN)/python $(WHEEL)

clean:
	rm -rf build dist *.egg-info attnengine/*.so $(STAMPS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/torch: | $(VENV)/bin/python
	mkdir -p $(STAMPS)
	$(BIN)/python -c 'import torch' 2>/dev/null || \
	  $(BIN)/python -m pip install 'torch==$(TORCH)'
	touch $@

$(STAMPS)/build-tools: $(STAMPS)/torch
	$(BIN)/python -m pip install 'setuptools>=77' wheel 'pybind11>=2.12' ninja numpy
	touch $@

# CUDA kernels are compiled in the tests, and run in a simulator: CUTLASS's headers, without the
# package's dependencies (cuda-python, scipy, networkx and others), which are for its own generator;
# and a toolkit from PyPI, 280 MB, where no nvcc is found. Its parts are pinned to one version.
CUTLASS := 4.2.0.0
CUDA_PARTS := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime
$(STAMPS)/cuda: | $(VENV)/bin/python
	mkdir -p $(STAMPS)
	$(BIN)/python -m pip install --no-deps 'nvidia-cutlass==$(CUTLASS)'
	command -v nvcc || test -n "$${CUDA_HOME:-$${CUDA_PATH:-}}" || test -x /usr/local/cuda/bin/nvcc || \
	  $(BIN)/python -m pip install --no-deps $(CUDA_PARTS:%='%==13.0.*')
	touch $@

$(STAMPS)/installed: $(STAMPS)/build-tools $(STAMPS)/cuda pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --no-build-isolation -e '.[test,dev]'
	touch $@

.PHONY: .venv
.venv: $(STAMPS)/installed
