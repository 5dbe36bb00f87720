# Two commands for a newcomer: `make demo` and `make test`. Both create .venv if it is missing.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RESULTS ?= layerwise-results
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test lint bench faults clean

setup: $(INSTALLED)

# torch first and by itself, so that the pinned version is there before anything else could ask for another one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/layerwise run workflows/quickstart.yaml --results $(RESULTS)
	$(BIN)/layerwise frontier --results $(RESULTS) --plot $(RESULTS)/frontier.png

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

bench: setup
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/solvers.py
	$(BIN)/python benchmarks/main_job.py
	$(BIN)/python benchmarks/menu.py
	$(BIN)/python benchmarks/depth.py
	$(BIN)/python benchmarks/width.py
	$(BIN)/python benchmarks/sparsity.py
	$(BIN)/python benchmarks/joint.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/kernels.py

faults: setup
	$(BIN)/python -m pytest -m slow tests/pipeline

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
