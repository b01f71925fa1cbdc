# Two commands: `make reproduce` re-runs the paper, `make test` checks everything.
# Needs only make and Python 3.11 or newer; every target first builds .venv from requirements.lock by itself.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PROFILE ?= toy
DATA ?=
TRACKED ?=
RUNS ?= runs
# python3.11 first: the lock was tested with it. Any newer Python is taken when 3.11 is absent.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(p) 2>/dev/null),$(p))) python3)
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# One thread per process: on small models two processes side by side beat two threads in one, and
# sums come out the same on every run.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
# The kernel of .venv, even where a user-level kernel has the same name.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help setup reproduce test test-slow notebooks figures report backbone smollm2 verify lock clean distclean

help:  ## show this list
	@echo "usage: make <target> [PROFILE=toy|smollm2|local|gpu|paper-2b|paper-3b|paper-4b|released] [DATA=folder]"
	@grep -E '^[a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-11s %s\n", $$1, $$2}'

# The package itself goes in without build isolation (setuptools comes with the lock) and without
# dependencies (the lock has them all).
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: Python 3.11 or newer is needed; found $$($(PYTHON) --version 2>/dev/null || echo none). Set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.lock into $(VENV) (once, a few minutes)"
	$(PY) -m pip install --quiet --requirement requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup: $(STAMP)  ## build .venv from requirements.lock

reproduce: $(STAMP)  ## run the whole paper: PROFILE=toy (default), or PROFILE=local DATA=folder
	$(PY) -m sarmlib reproduce --profile $(PROFILE) --runs $(RUNS) $(if $(DATA),--data "$(DATA)")

# nbval gets a fresh, empty artifact folder, so that the notebooks train instead of reading a cache.
test: $(STAMP)  ## lint, types, unit tests, and every notebook re-executed and compared with its committed output
	$(PY) -m ruff check .
	$(PY) -m mypy --no-error-summary
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow"
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	if ls notebooks/*.ipynb >/dev/null 2>&1; then \
	  SARMLIB_RUNS="$$runs" $(PY) -m pytest -q -p no:cacheprovider --nbval --nbval-current-env --nbval-cell-timeout=600 notebooks; \
	else echo "no notebooks yet"; fi

test-slow: $(STAMP)  ## the slow tests: a run that is killed goes on, a wheel reproduces without a checkout
	$(PY) -m pytest -q -m slow

notebooks: $(STAMP)  ## refresh the committed notebook outputs (toy profile)
	$(PY) -m sarmlib notebooks

figures: $(STAMP)  ## where the figures of the last run are; TRACKED=1: copy them to figures/
	$(PY) -m sarmlib figures --profile $(PROFILE) --runs $(RUNS) $(if $(TRACKED),--tracked)

report: $(STAMP)  ## write the tables of the last run below runs/; TRACKED=1: to results/, toy's into the README too
	$(PY) tools/readme_tables.py --profile $(PROFILE) --runs $(RUNS) $(if $(DATA),--data "$(DATA)") $(if $(TRACKED),--tracked)

backbone: $(STAMP)  ## pretrain the shipped toy backbone again
	$(PY) tools/backbone.py

smollm2: $(STAMP)  ## fetch the decoder of PROFILE=smollm2 into models/ (90 MB, once)
	$(PY) tools/smollm2.py

verify: $(STAMP)  ## which claims hold in the last run, and whether every stored artifact is whole
	$(PY) -m sarmlib verify --profile $(PROFILE) --runs $(RUNS)

# Packages of CUDA are left out of the lock: the ordinary Linux wheel of torch names its own exact versions, and
# a CPU wheel needs none of them. Versions that still fit stay: the numbers here were measured with them.
lock:  ## pin requirements.lock again from pyproject.toml (needs uv)
	@uv=$$(command -v uv || ls $(VENV)/bin/uv 2>/dev/null) || { echo "error: uv is needed for make lock" >&2; exit 1; }; \
	cp requirements.lock requirements.lock.tmp; \
	"$$uv" pip compile pyproject.toml --quiet --universal --python-version 3.11 --extra notebooks --extra dev \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file requirements.lock.tmp; \
	{ echo "# Written by 'make lock' from pyproject.toml (extras notebooks, dev); do not edit."; \
	  echo "# CUDA packages are not pinned here: a CUDA build of torch asks for its own exact versions."; \
	  grep -vE '^(nvidia-|cuda-|triton==|pytorch-triton)' requirements.lock.tmp; } > requirements.lock.new; \
	mv requirements.lock.new requirements.lock; rm -f requirements.lock.tmp

clean:  ## remove runs and caches
	rm -rf $(RUNS) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)
