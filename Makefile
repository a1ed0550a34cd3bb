# `make quickstart` and `make test` do all the set-up there is.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch, CPU build or CUDA build, is whatever your package index offers for the range in pyproject.toml.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
TEST_WORKERS ?= 2

.PHONY: help quickstart install test lint types unit soak size format clean

help:
	@echo "make quickstart   install, fine-tune a tiny model, print one answer"
	@echo "make test         install with the development tools; lint, types, tests"
	@echo "make soak         the long tests: more kills, more random inputs, older versions of transformers"
	@echo "make size         lines and files of each room"
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

test: lint types unit

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED_DEV)
	$(BIN)/mypy

# Two workers on two cores: each test computes with one thread unless it asks for more.
unit: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not soak"

soak: $(INSTALLED_DEV)
	-$(BIN)/python -m pip install --quiet --only-binary :all: 'atheris>=2.3'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

size:
	@$(PYTHON) benchmarks/size.py

format: $(INSTALLED_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
