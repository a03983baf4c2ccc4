# make install: .venv with everything; the other targets call it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-all lint bench clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "moecl needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,dev,osft,ray,report,serve,tensorboard]'
	touch $@

demo: install
	$(BIN)/moecl demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto

test-all: lint
	$(BIN)/pytest -n auto -m ""

# Each needs a quiet machine; together under 50 minutes on 2 cores.
bench: install
	@test -n "$(DATA)" || { echo "make bench: train_stream needs texts: make bench DATA=a folder of folders with train.jsonl and task.json" >&2; exit 2; }
	set -e; for name in train_step predict generate many_tasks serve; do $(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name.json; done
	$(BIN)/python benchmarks/train_stream.py --data "$(DATA)" --json benchmarks/results/train_stream.json
	$(BIN)/python benchmarks/router.py --data "$(DATA)" --json benchmarks/results/router.json
	$(BIN)/python benchmarks/table.py --write

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
