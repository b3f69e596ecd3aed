# make demo    set up, train, prune, quantize and time a network, write the report
# make test    set up, lint, check types, run the tests
# make fuzz    thousands of random networks through shrink (CASES=2000)
# make bench   the timings, side by side
PYTHON ?= python3
CASES ?= 2000
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint fuzz bench clean

demo: $(VENV)/.train
	$(BIN)/python -m train.main --config configs/quickstart.py --workdir runs/quickstart

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.prune.fuzz --cases $(CASES)

bench: $(VENV)/.train
	$(BIN)/python -m benchmarks.analysis
	$(BIN)/python -m benchmarks.inference
	$(BIN)/python -m benchmarks.reparam
	$(BIN)/python -m benchmarks.pruning
	$(BIN)/python -m benchmarks.qat
	$(BIN)/python -m benchmarks.binary

$(VENV)/.train: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[train]'
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.train
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist .ruff_cache .hypothesis
