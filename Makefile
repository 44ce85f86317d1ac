PYTHON ?= python3
BIN := .venv/bin

# Everything is installed into .venv; --no-build-isolation builds the kernels against the torch in it.
.venv/installed: pyproject.toml setup.py $(wildcard cuda_ops/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja "torch>=2.11"
	$(BIN)/pip install --no-build-isolation --editable ".[dev]"
	touch $@

.PHONY: install test lint
install: .venv/installed

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror cuda_ops/*
