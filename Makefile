# `make quickstart` and `make test` do all the set-up there is.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch, CPU build or CUDA build, is whatever your package index offers for the range in pyproject.toml.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
TEST_WORKERS ?= 2

.PHONY: help quickstart install test lint types unit kernels soak size gpu gpu-pack format clean

help:
	@echo "make quickstart   install, fine-tune a tiny model, print one answer"
	@echo "make test         install with the development tools; lint, types, tests"
	@echo "make soak         the long tests: more kills, more random inputs, older versions of transformers"
	@echo "make size         lines and files of each room"
	@echo "make gpu          what a GPU does, beside this project's goals; gpu-pack: what it takes to a machine without pip"
	@echo "make format       format and mend what can be mended by itself"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(INSTALLED_DEV): $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev,eval]'
	@touch $@ $(INSTALLED)

install: $(INSTALLED)

quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/llama-acc finetune --recipe quickstart --output runs/quickstart
	@echo "> What is LLaMA?"
	@$(BIN)/llama-acc chat --ckpt runs/quickstart --temperature 0 --prompt "What is LLaMA?"

# mypy has one core, and the kernels' tests the other.
test: lint
	$(MAKE) -j2 types kernels
	$(MAKE) unit

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED_DEV)
	$(BIN)/mypy

# Two workers on two cores: each test computes with one thread unless it asks for more. Compiled tests are kept, for one
# worker from the other.
unit: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not soak"

# A GPU's kernels, in Triton's interpreter. Apart from the rest: where Triton is installed, bitsandbytes imports it, too.
kernels: $(VENV)/.installed-triton
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(VENV)/triton) $(BIN)/python -m pytest -n $(TEST_WORKERS) tests/core/model/test_gpu_ways.py

$(VENV)/.installed-triton: $(INSTALLED_DEV)
	-$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/triton 'triton>=3.3'
	@touch $@

soak: $(INSTALLED_DEV)
	-$(BIN)/python -m pip install --quiet --only-binary :all: 'atheris>=2.3'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

size:
	@$(PYTHON) benchmarks/size.py

# On a machine that has torch and transformers, and no package index: the pack's packages and Python's own.
GPU_PACK := gpu-pack
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,PYTHONPATH=.:$(GPU_PACK) $(PYTHON))
GPU_RESULTS ?= gpu.jsonl

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --results $(GPU_RESULTS)

# For Python 3.12 on x86-64, of bitsandbytes the kernels for CUDA 13 and the CPU; 15 MB at most.
GPU_PIP = $(PYTHON) -m pip install --quiet --no-compile --target $(GPU_PACK) --only-binary :all: --python-version 3.12 \
	$(foreach version,2_28 2_24 2_17 2014,--platform manylinux$(if $(findstring _,$(version)),_)$(version)_x86_64)

gpu-pack:
	rm -rf $(GPU_PACK)
	$(GPU_PIP) pydantic msgspec backports.zstd
	$(GPU_PIP) --no-deps bitsandbytes
	find $(GPU_PACK)/bitsandbytes -name 'libbitsandbytes_*' ! -name '*_cpu.*' ! -name '*_cuda130*' -delete
	du -sh $(GPU_PACK)

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
