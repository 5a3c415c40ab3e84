# Everything a new machine needs: Python 3.11 or 3.12, make, g++ and pip access.
#   make demo       fetch packages, build data and backbone, train on 2 CPU processes, print one table
#   make test       the tests, at most 8 minutes on 2 cores
#   make test-all   the slow, multi-node and browser tests too
#   make check      formatting, lint and types

PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: venv demo test test-all check clean

venv: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else "Python 3.11 or 3.12 is needed, found %d.%d; set PYTHON=/path/to/python" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	touch $@

data/demo/manifest.json: .venv/installed
	$(BIN)/python data_prep/demo.py --out data/demo

demo: .venv/installed
	$(BIN)/python launch/demo.py

test: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-all: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not gpu'

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv data runs
