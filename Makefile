# What to run is listed by `make help`. Everything needs only make and Python >= 3.11: the tools are
# installed into a virtual environment, in the releases that uv.lock pins.

PYTHON ?= python3
VENV ?= .venv
PYTEST_WORKERS ?= auto
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# A virtual environment that happens to be active must not be the one that is filled.
UV := env -u VIRTUAL_ENV UV_PROJECT_ENVIRONMENT=$(VENV) UV_PYTHON=$(BIN)/python $(BIN)/uv
UV_REQUIREMENT := uv>=0.13.9,<0.14

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow bench lint format docs lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Install casbackup, editable, into .venv

demo: $(VENV)/.installed ## Back up a real disk image, change it, restore it, compare
	@CASBACKUP="$${CASBACKUP:-$(BIN)/casbackup}" PYTHON=$(BIN)/python sh scripts/demo.sh

test: lint ## Check the sources and run the tests
	@$(BIN)/pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-slow: $(VENV)/.dev ## Run the tests that take minutes: crashes, growth, long histories
	@$(BIN)/pytest -m "slow and not bench" --timeout 3600 $(PYTEST_ARGS)

bench: $(VENV)/.dev ## Run the benchmarks, one at a time
	@$(BIN)/pytest -m bench --timeout 3600 $(PYTEST_ARGS)

lint: $(VENV)/.dev ## Check style, formatting, types and layers
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## Format the sources and fix what can be fixed safely
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: $(VENV)/.dev ## Generate the reference pages
	@$(BIN)/python docs/generate.py

lock: $(VENV)/.uv ## Bring uv.lock up to date (UV_LOCK_ARGS=--upgrade for newer releases)
	@$(UV) lock $(UV_LOCK_ARGS)

clean: ## Remove the virtual environment, caches and builds
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.uv:
	@command -v $(PYTHON) >/dev/null || \
	    { echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$$($(PYTHON) --version) is too old: casbackup needs 3.11 or newer. Name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV_REQUIREMENT)'
	@touch $@

$(VENV)/.installed: pyproject.toml uv.lock $(VENV)/.uv
	@$(UV) sync --quiet --locked --no-dev --inexact
	@touch $@

$(VENV)/.dev: pyproject.toml uv.lock $(VENV)/.uv
	@$(UV) sync --quiet --locked
	@touch $@ $(VENV)/.installed
