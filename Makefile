# The targets are the documentation of how this project is run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.installed  ## prune the embedded model: no hub, no GPU
	$(BIN)/adapt-pruner demo --output demo-run

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/python -m pytest --numprocesses auto

check: $(VENV)/.installed-dev  ## lint, format, types
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-dev  ## quality on the embedded model, cost of a step
	$(BIN)/adapt-pruner compare demo --evaluate pydocs --output runs/compare-demo
	$(BIN)/python benchmarks/step_cost.py --sizes 10M,100M

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-run .pytest_cache .ruff_cache .hypothesis
