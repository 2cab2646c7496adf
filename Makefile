# make quickstart: install, and run the main job on what is built in. make test: install what tests need, and run them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Memory in huge pages: steps on a CPU allocate hundreds of MiB each (docs/performance.md). Only Linux's C library heeds it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m hast_jax.main --config=configs/digits.py:w3a3,best --workdir=runs/digits

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV)
