# make quickstart: install, then text -> tokenizer -> shards -> training -> evaluation on this CPU.
# make test:       install, then the CPU test suite.
# Both make .venv first and do nothing twice. Variables: PYTHON (3.11 or newer), VENV, ARGS.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := requirements/constraints.txt
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest
export PYTHON

.PHONY: help install quickstart quickstart-fresh test test-slow slurm lint arrows bench soak resume readme wheel lock clean

help:
	@grep -E '^# make|^[a-z-]+:.*##' Makefile | sed -E 's/^# //; s/:.*## */: /'

install: $(STAMP) ## make .venv with the pinned packages and this project, editable

$(STAMP): $(PINS) pyproject.toml scripts/install.sh
	@scripts/install.sh $(VENV)
	@touch $@

quickstart: $(STAMP) ## the main job end to end; continues where it stopped
	$(BIN)/python scripts/quickstart.py $(ARGS)

quickstart-fresh: $(STAMP) ## the main job, from the start again
	$(BIN)/python scripts/quickstart.py --restart $(ARGS)

test: $(STAMP) ## the CPU test suite
	$(PYTEST) -m "not slow and not gpu and not multi_gpu and not slurm" $(ARGS)

test-slow: $(STAMP) ## the long matrices
	$(PYTEST) -m "slow and not gpu and not multi_gpu and not slurm" --timeout 1800 $(ARGS)

slurm: $(STAMP) ## the tests on a real Slurm, started by them; needs root, slurm-wlm and munge
	LLMTRAIN_SLURM=required $(PYTEST) -m slurm $(ARGS) tests/slurm

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

arrows: $(STAMP) ## imports go one way
	$(BIN)/lint-imports

bench: $(STAMP) ## benchmarks that run on a CPU
	@set -e; for file in $(sort $(wildcard kernels/bench/*.py data_prep/bench/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file; done

soak: $(STAMP) ## an hour: kill trainings and damage checkpoints, compare with undisturbed twins
	$(BIN)/python scripts/soak.py kill damage report --out runs/soak $(ARGS)

resume: $(STAMP) ## an hour: stop every mixer at every stage, continue on the same and on other ranks
	$(BIN)/python scripts/soak.py resume report --out runs/soak $(ARGS)

readme: $(STAMP) ## write the tables and the tree of README.md from the files
	$(BIN)/python scripts/readme.py

wheel: $(STAMP) ## dist/*.whl
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation -w dist .

lock: $(STAMP) ## write the installed versions into requirements/constraints.txt
	@head -2 $(PINS) > $(PINS).new
	@$(BIN)/python -m pip list --format=freeze --exclude pip --exclude-editable | sed 's/+cpu//' >> $(PINS).new
	@mv $(PINS).new $(PINS)

clean: ## remove caches and build outputs (not .venv, data or runs)
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
