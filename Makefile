# make quickstart: install, and run the main job on what is built in. make test: install what tests need, and run them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Memory in huge pages: steps on a CPU allocate hundreds of MiB each (docs/performance.md). Only Linux's C library heeds it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-oldest site lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m hast_jax.main --config=configs/digits.py:w3a3,best --workdir=runs/digits

test: lint
	$(BIN)/python -m pytest

# The pages as a site, in the folder site.
site: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# The oldest dependencies that pyproject.toml allows, in an environment and with compiled programs of their own.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[dev]'
	HAST_JAX_CACHE=$(VENV)-oldest/compiled $(VENV)-oldest/bin/python -m pytest tests/test_quant.py tests/test_losses.py \
		tests/test_learned.py tests/test_golden_quantizer.py tests/test_run.py tests/test_library.py tests/test_export.py

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
