# Everything runs in .venv; each target sets it up first where that is not done yet.
#
#   PYTHON=python3.12    the interpreter a new .venv is made with: 3.11 or later
#   VENV=.venv-2         another folder than .venv
#   DETECTRON2=...       another Detectron2, as a line of a requirements file: a folder, a wheel, git+https://...
#                        It is kept until another one is asked for; DETECTRON2=default goes back.
#   ARGS=...             more words for the target's last command: make test ARGS='-k matcher -x'

PYTHON ?= python3
VENV ?= .venv
DETECTRON2 ?= $(or $(shell cat '$(VENV)/.detectron2' 2>/dev/null),default)
ARGS ?=

BIN := $(VENV)/bin
# The stamp's name is a digest of all that the set-up depends on: what changes one of them sets up again.
quote = '$(subst ','\'',$(1))'
INPUTS := setup.cfg setup.py pyproject.toml $(wildcard requirements/*)
STAMP := $(VENV)/.setup-$(shell { echo $(call quote,$(DETECTRON2)); cat $(INPUTS); } | sha256sum | cut -c1-16)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-faults lint format docs bench bench-quick

help:
	@echo 'make demo         train on aerial images of trees, evaluate, show what the detector sees and misses'
	@echo 'make test         style and tests; make test-slow: the tests that take longer'
	@echo 'make test-faults  hundreds of random faults, and what became of the runs they hit'
	@echo 'make lint         style and types only; make format puts right what it can'
	@echo 'make docs         the site of docs/, in site/'
	@echo 'make bench        speed and memory beside Detectron2; make bench-quick: in a few minutes'
	@echo 'make setup        only what the others do first: .venv with all requirements (see the top of the Makefile)'

setup: $(STAMP)
	@:

$(STAMP):
	@PYTHON=$(call quote,$(PYTHON)) VENV=$(call quote,$(VENV)) DETECTRON2=$(call quote,$(DETECTRON2)) \
		STAMP=$@ PIP_DISABLE_PIP_VERSION_CHECK=1 sh requirements/install.sh

# A run of its own folder each time: output/quickstart, output/quickstart-2, ...
demo: setup
	$(BIN)/python -m focal_plugin.data.quickstart --output datasets/quickstart_trees
	@out=output/quickstart; n=1; while [ -e "$$out" ]; do n=$$((n + 1)); out=output/quickstart-$$n; done; set -x; \
	$(BIN)/python train_net.py --config-file configs/quickstart/trees.yaml OUTPUT_DIR "$$out" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread a process: the processes share the cores. One more than there are cores, since some tests wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $$(($$(nproc) + 1)) --maxprocesses 4 --dist worksteal

test: lint
	$(PYTEST) $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

# The whole campaign of random faults on training, evaluation, predict and export, the soak test and the long fuzzers: 30
# to 45 minutes.
test-faults: setup
	FAULTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/faults $(ARGS)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: setup
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

bench-quick: setup
	$(BIN)/python tests/benchmarks/run.py --quick $(ARGS)
