# Everything runs in .venv. PYTHON names the interpreter that makes it (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint bench soak clean

install: $(VENV)/.installed

# torch first and pinned: any other request pulls gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

quickstart: install
	$(BIN)/orchestrator quickstart

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

# Side by side with peers, which are installed into environments of their own; an hour or so. Tables and JSON.
bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.statistics --save
	$(BIN)/python -m benchmarks.walk --repeats 3 --save
	$(BIN)/python -m benchmarks.walk --memory --save
	$(BIN)/python -m benchmarks.walk --cases "AWQ W4g128" "AWQ W3g128" "SparseGPT 50 %" "SparseGPT 2:4" --name awq-sparsegpt --save
	$(BIN)/python -m benchmarks.sweep --save
	$(BIN)/python -m benchmarks.bounded --save
	$(BIN)/python -m benchmarks.llm_pruner --save
	$(BIN)/python -m benchmarks.overhead --save
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.preflight --save
	$(BIN)/python -m benchmarks.depth --save
	$(BIN)/python -m benchmarks.conformance --save
	$(BIN)/python -m benchmarks.mixed --save
	$(BIN)/python -m benchmarks.distillation --save
	$(BIN)/python -m benchmarks.recovery --save
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.hybrid --save
	$(BIN)/python -m benchmarks.paging --save
	$(BIN)/python -m benchmarks.engines.parsers --save
	$(BIN)/python -m benchmarks.release_speed --save
	$(BIN)/python -m benchmarks.release_faults --save
	$(BIN)/python -m benchmarks.streaming --save
	$(BIN)/python -m pip install --quiet -c constraints.txt atheris==3.0.0
	$(BIN)/python -m benchmarks.fuzz --save

# Kills runs at 200 moments and more.
soak: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.soak --points 240 --save

clean:
	rm -rf $(VENV) .orchestrator build dist
