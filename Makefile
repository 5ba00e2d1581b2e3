# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Processes that share the tests, a file at a time, each on its part of the cores.
JOBS   ?= 2
# Reference data and golden masks; tests that need them skip where the folder is absent.
export PRUNUS_SHARED ?= ../shared

.PHONY: demo test check cuda docs sanitize install clean

# One stamp per environment: installing again is a no-op until the project file changes.
STAMP := $(VENV)/.prunus-installed

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,gguf,data,eval,adapters]'
	touch $@

install: $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# On a machine with a CUDA device: the tests that need one, then a table of what runs take there.
cuda: $(STAMP)
	$(BIN)/python -m pytest -m cuda
	$(BIN)/python benchmarks/gpu.py build/gpu --json docs/results/gpu.json

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# The site, in build/site. Warnings are errors; nothing is loaded from the network.
DOCS_STAMP := $(VENV)/.prunus-docs-installed

$(DOCS_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache

# Memory errors and undefined behaviour in the kernels.
sanitize:
	sh tests/packed/kernels/sanitize.sh
