# Every target sets itself up in .venv and does nothing twice. `make` alone lists them.
#   make test PYTHON=python3.12            another Python (after `make clean`)
#   make test PYTEST_ARGS="-k pipeline"    only some tests
#   make test WORKERS=0                    all tests in one process
#   make zoo PYTEST_ARGS="-k bert"         only some models of other packages
#   make corners CORNERS="lowest hydra14"  only some environments
#   make gpu GPU_PYTHON=python3            with the packages of this Python, installing nothing

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
CORNERS ?=
VENV := .venv
BIN := $(VENV)/bin
ZOO := $(VENV)/zoo
# A file's tests stay together: they share fixtures, a running Ray above all.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SETUP := pyproject.toml setup.py constraints.txt

# The stamps go first, so that an interrupted install leaves none.
define install
@rm -f $(VENV)/.demo $(VENV)/.test
@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	{ echo "Creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
@echo "Installing .$(EXTRAS) (minutes the first time; details in $(VENV)/pip.log)"
@$(BIN)/python -m pip install --quiet --log $(VENV)/pip.log -c constraints.txt -e '.$(EXTRAS)'
endef

# What .venv holds is borrowed, not installed again. Lightning imports torchvision and transformers
# wherever they are, which takes seconds at each start, so they stay out of .venv itself.
define install_zoo
@rm -f $@
@echo "Installing .[zoo] into $(ZOO) (a minute the first time; details in $(ZOO)/pip.log)"
@$(BIN)/python -m venv $(ZOO)
@printf '%s\n' "$$($(BIN)/python -c "$(SITE)")" "$(CURDIR)/tests/zoo/site" \
	"import torchvision_operators" > "$$($(ZOO)/bin/python -c "$(SITE)")/borrowed.pth"
@$(ZOO)/bin/python -m pip install --quiet --log $(ZOO)/pip.log -c constraints.txt -e '.[zoo]'
@touch $@
endef
SITE := import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: help demo test test-fast zoo corners gpu lint bench constraints clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Train the default model with distributed data parallel
	$(BIN)/python -m lightning_mgpu +strategy=ddp

test: lint ## Lint, types and every test
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(VENV)/.test ## The tests that take a few seconds
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

zoo: $(ZOO)/.ready ## Train models of other packages, in an environment of their own
	$(ZOO)/bin/python -m pytest -n $(WORKERS) tests/zoo $(PYTEST_ARGS)

corners: ## Test the oldest, newest and coming releases, in environments of their own
	@$(PYTHON) .ci/corners.py $(CORNERS)

gpu: $(if $(GPU_PYTHON),,$(VENV)/.test) ## On a machine with a GPU: its tests, then its benchmark
	@$(if $(GPU_PYTHON),$(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py --tests $(PYTEST_ARGS)

lint: $(VENV)/.test ## Ruff (rules, format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.test ## Run every benchmark
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

constraints: $(ZOO)/.ready ## Pin in constraints.txt what .venv and its zoo hold
	$(ZOO)/bin/python .ci/constraints.py > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean: ## Remove .venv, caches, builds and the outputs of runs
	rm -rf $(VENV) build dist ./*.egg-info outputs multirun lightning_logs
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: EXTRAS :=
$(VENV)/.demo: $(SETUP)
	$(install)
	@touch $@

$(VENV)/.test: EXTRAS := [all,dev]
$(VENV)/.test: $(SETUP)
	$(install)
	@touch $(VENV)/.demo $@

$(ZOO)/.ready: $(VENV)/.test
	$(install_zoo)
