# make quickstart: install, and quantize the built-in digits network. make test: install what tests need, and run the tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Memory in huge pages, because each step on a CPU allocates hundreds of MiB (docs/performance.md). Only glibc reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test test-oldest site lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m hast_jax.main --config=configs/digits.py:w3a3,best --workdir=runs/digits
	@echo "To give such commands, first activate the environment: . $(BIN)/activate"

test: lint
	$(BIN)/python -m pytest

# Build the pages of docs as a site, in the folder site.
site: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# Test with the oldest dependencies that pyproject.toml allows, in a separate environment with its own compiled programs.
# The oldest jaxlib logs an error whenever it loads a compiled program, which a test of a silent library would notice.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[dev]'
	TF_CPP_MIN_LOG_LEVEL=3 HAST_JAX_CACHE=$(abspath $(VENV))-oldest/compiled $(VENV)-oldest/bin/python -m pytest \
		tests/test_quant.py tests/test_losses.py tests/test_learned.py tests/test_golden_quantizer.py tests/test_run.py \
		tests/test_library.py tests/test_export.py tests/test_onnx.py tests/test_nnx.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[onnx]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV)
