# `make` lists the targets. VENV=path uses another virtual environment, PYTHON=python3.12 another interpreter.
PYTHON ?= python3
VENV ?= .venv
# Options for installing torch, e.g. TORCH_OPTIONS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_OPTIONS ?=
PYTEST_OPTIONS ?= -n 2
# Options for the benchmarks, e.g. BENCH_OPTIONS="--mergekit ../mergekit/bin/mergekit-yaml --sizes 60M"
BENCH_OPTIONS ?=
# Options for the reproduction, e.g. REPRODUCE_OPTIONS="--workers 1"
REPRODUCE_OPTIONS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo reproduce test check bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

venv: $(INSTALLED) ## make the virtual environment and install everything in it

# torch comes first and by its exact version: a range would let pip fetch several builds of some gigabytes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_OPTIONS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,dev,bench]"
	@touch $@

demo: $(INSTALLED) demo/.trained ## train small checkpoints, merge them, compare the result with its parents
	rm -rf out/quickstart
	$(BIN)/merge run recipes/quickstart.yaml
	$(BIN)/python scripts/evaluate_digits.py

demo/.trained: scripts/train_digits.py scripts/digits.py | $(INSTALLED)
	$(BIN)/python scripts/train_digits.py --out demo
	@touch $@

reproduce: $(INSTALLED) ## measure what the papers claim, write docs/reproduction.md and the pages behind it
	$(BIN)/python scripts/reproduce $(REPRODUCE_OPTIONS)
	$(BIN)/python scripts/reproduce/eight_page.py --write docs/eight_tasks.md
	$(BIN)/python scripts/reproduce/alignment_page.py --write docs/alignment.md

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

check: $(INSTALLED) ## lint, formatting, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

bench: $(INSTALLED) ## measure time and memory of every method, write benchmarks/RESULTS.md
	$(BIN)/python benchmarks/bench.py --write benchmarks/RESULTS.md $(BENCH_OPTIONS)

docs: $(INSTALLED) ## write docs/methods.md anew from the registry of methods
	$(BIN)/merge methods --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md

clean: ## remove the demo, caches, builds and the virtual environment
	rm -rf demo out/quickstart build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)
	find . -name __pycache__ -prune -exec rm -rf {} +
