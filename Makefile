# make quickstart: install, then text -> tokenizer -> shards -> training -> evaluation on this CPU.
# make test:       install, then the CPU test suite.
# Both make .venv first and do nothing twice. Variables: PYTHON (3.11 or newer), VENV, ARGS.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := requirements/constraints.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(PINS)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: help install quickstart quickstart-fresh test test-slow lint arrows bench wheel lock clean

help:
	@grep -E '^# make|^[a-z-]+:.*##' Makefile | sed -E 's/^# //; s/:.*## */: /'

install: $(STAMP) ## make .venv with the pinned packages and this project, editable

# torch comes first because DeepSpeed's setup imports it; hence no build isolation either.
$(STAMP): $(PINS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "No C++ compiler (c++ or g++): DeepSpeed compiles its CPU communication. On Debian: apt-get install g++" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "$(PYTHON) lacks its C headers (Python.h), which DeepSpeed compiles with. On Debian: apt-get install python3-dev" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "== 1/3 torch and build tools"
	$(PIP) setuptools wheel ninja packaging py-cpuinfo numpy torch
	@echo "== 2/3 deepspeed"
	$(PIP) --no-build-isolation deepspeed
	@echo "== 3/3 llmtrain and the rest"
	$(PIP) --no-build-isolation -e '.[dev,tensorboard,wandb]'
	@touch $@

quickstart: $(STAMP) ## the main job end to end; continues where it stopped
	$(BIN)/python scripts/quickstart.py $(ARGS)

quickstart-fresh: $(STAMP) ## the main job, from the start again
	$(BIN)/python scripts/quickstart.py --restart $(ARGS)

test: $(STAMP) ## the CPU test suite
	$(PYTEST) -m "not slow and not gpu and not multi_gpu" $(ARGS)

test-slow: $(STAMP) ## the long matrices
	$(PYTEST) -m "slow and not gpu and not multi_gpu" --timeout 1800 $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

arrows: $(STAMP) ## imports go one way
	$(BIN)/lint-imports

bench: $(STAMP) ## benchmarks that run on a CPU
	@set -e; for file in $(sort $(wildcard kernels/bench/*.py data_prep/bench/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file; done

wheel: $(STAMP) ## dist/*.whl
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation -w dist .

lock: $(STAMP) ## write the installed versions into requirements/constraints.txt
	@head -2 $(PINS) > $(PINS).new
	@$(BIN)/python -m pip list --format=freeze --exclude pip --exclude-editable | sed 's/+cpu//' >> $(PINS).new
	@mv $(PINS).new $(PINS)

clean: ## remove caches and build outputs (not .venv, data or runs)
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
