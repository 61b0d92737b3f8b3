# Thin calls of `alst`; no logic lives here. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
# Where pip finds torch; empty is pip's own configuration. On a machine without a GPU, the index of CPU wheels saves GBs.
TORCH_INDEX ?=
RECIPE ?= tiny
PORT   ?= 5000
RUNS   := $(or $(ALST_RUNS),runs)
ARGS   ?=
# Of the throw-away Slurm cluster. Short: a socket's path in it may not be longer than 107 characters.
CLUSTER_DIR ?= /tmp/alst-cluster-$(shell id -u)

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
LOCK := containers/versions.lock

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-million plan train stage submit image cluster-up cluster-down
.PHONY: drills test test-quick test-full test-gpu test-packages lint mlflow clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

setup: $(VENV)/.ready ## make the environment in .venv

demo: $(VENV)/.ready ## train on real text on this machine: the whole path, small
	$(BIN)/alst train tiny $(ARGS)

demo-million: $(VENV)/.ready ## one step on one sample of 1,048,576 tokens, on the CPU; what each memory feature saves
	$(BIN)/alst train tiny-million $(ARGS)
	@$(BIN)/python -m benchmarks.memory --show

plan: $(VENV)/.ready ## the derived numbers of RECIPE
	$(BIN)/alst plan $(RECIPE) $(ARGS)

train: $(VENV)/.ready ## train RECIPE on this machine
	$(BIN)/alst train $(RECIPE) $(ARGS)

stage: $(VENV)/.ready ## on a node with internet: fetch what RECIPE names on the hub into HF_HOME
	$(BIN)/alst stage $(RECIPE) $(if $(CLUSTER),--cluster $(CLUSTER)) $(ARGS)

submit: $(VENV)/.ready ## RECIPE as Slurm jobs on NODES nodes: [CLUSTER=name] [DRY_RUN=1] [REHEARSE=1] [ARGS="k=v"]
	$(BIN)/alst submit $(RECIPE) $(if $(CLUSTER),--cluster $(CLUSTER)) $(if $(NODES),--nodes $(NODES)) \
		$(if $(DRY_RUN),--dry-run) $(if $(REHEARSE),--rehearse) $(ARGS)

image: $(VENV)/bin/python ## the Apptainer image with CUDA; IMAGE=cpu without; in $ALST_IMAGES
	@TORCH_INDEX=$(TORCH_INDEX) $(BIN)/python containers/build.py $(or $(IMAGE),cuda)

mlflow: $(VENV)/.ready ## the runs in a browser, on http://127.0.0.1:$(PORT)
	$(BIN)/mlflow server --host 127.0.0.1 --port $(PORT) --workers 1 \
		--backend-store-uri sqlite:///$(RUNS)/mlflow.db --artifacts-destination $(RUNS)/mlartifacts

cluster-up: ## a throw-away Slurm cluster on this machine: four nodes, fake GPUs, accounting
	@$(PYTHON) slurm/local_cluster.py install
	@$(PYTHON) slurm/local_cluster.py up $(CLUSTER_DIR)

cluster-down: ## end it, and all that ran on it
	@$(PYTHON) slurm/local_cluster.py down $(CLUSTER_DIR)

drills: $(VENV)/.ready-dev test-packages ## disturb runs on a real Slurm; what that cost goes into docs/operations.md
	ALST_DRILLS=docs/operations.md $(BIN)/python -m pytest -m "full or not full" tests/cluster/test_drills.py

test: $(VENV)/.ready-dev test-packages lint ## everything CI runs
	$(BIN)/python -m pytest

test-quick: $(VENV)/.ready-dev lint ## the unit tests alone, in seconds
	$(BIN)/python -m pytest tests/unit

test-full: $(VENV)/.ready-dev test-packages lint ## also the long products
	$(BIN)/python -m pytest -m "full or not full"

test-gpu: $(VENV)/.ready-dev ## what only a GPU can prove
	$(BIN)/python -m pytest tests/gpu -rs

# Where they cannot be installed the tests that need them are skipped by name; under CI=true that is a failure.
test-packages:
	@$(PYTHON) slurm/local_cluster.py install || { [ "$(CI)" != true ] && echo "make: tests/cluster will be SKIPPED"; }
	@$(PYTHON) containers/apptainer.py install || { [ "$(CI)" != true ] && echo "make: test_container will be SKIPPED"; }

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info

# Debian and Ubuntu ship Python without venv's pip: as root we install it, otherwise we say what to do.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version 2>&1): Python 3.11 or newer is needed; call make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y --no-install-recommends python3-venv; } || \
		{ echo "make: $(PYTHON) has no venv; run: sudo apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first: an open range from another package would take the newest CUDA build. DeepSpeed builds against it.
$(VENV)/.ready: $(VENV)/bin/python pyproject.toml $(LOCK)
	$(PIP) install -q -c $(LOCK) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q -c $(LOCK) setuptools wheel ninja packaging py-cpuinfo psutil
	DS_BUILD_OPS=0 $(PIP) install -q -c $(LOCK) --no-build-isolation deepspeed
	$(PIP) install -q -c $(LOCK) --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install -q -c $(LOCK) --no-build-isolation -e '.[train,dev]'
	@touch $@
