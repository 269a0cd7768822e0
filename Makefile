# Everything runs in .venv, made on first use with the versions of constraints.txt.
# Another torch build: make TORCH_INSTALL="--index-url URL torch==2.13.0" test

PYTHON ?= python3
TORCH_INSTALL ?= $(shell grep '^torch==' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PROCESSES := tests/mp tests/cli tests/contracts/test_communicators.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: help demo test lint check golden bench figures reproduce smoke clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hardy needs Python 3.11 or later, or: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH_INSTALL)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train a small model on this machine's Python sources, let it write (minutes on two cores)
	$(BIN)/hardy train demo

test: $(READY) ## all tests, with the slowest named; those that start processes and measure time come alone
	$(PYTEST) --durations=10 -n auto --maxprocesses 8 -m "not mp"
	$(PYTEST) --durations=10 -m mp $(PROCESSES)

lint: $(READY) ## format, style, types, directions of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

check: lint test ## what CI runs

golden: $(READY) ## rewrite the golden files; read the difference before it is committed
	$(PYTEST) tests/golden tests/repo/test_golden_configs.py --write-golden
	git diff --stat tests/golden

bench: $(READY) ## compare speeds on this machine
	cd benchmarks && for script in bench_*.py; do ../$(BIN)/python $$script || exit 1; done

figures: $(READY) ## draw the pictures of docs/papers anew, from the result files
	$(BIN)/python docs/figures.py

reproduce: $(READY) ## run all experiments again and judge their claims (over an hour on two cores)
	$(BIN)/hardy reproduce all

smoke: $(READY) ## run all experiments for seconds each, to see that they run
	$(BIN)/hardy reproduce all --smoke

reproduce-%: $(READY)
	$(BIN)/hardy reproduce $*

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
