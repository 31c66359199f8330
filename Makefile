# Usage: make [help | setup | test | test-all | demo | lint | clean] [PYTHON=python3.11]
PYTHON ?= python3
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile

export PYTHON
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help setup test test-all demo lint clean .venv

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST)

# Does nothing when all is there, goes on where an interrupted run stopped.
.venv:
	@requirements/install.sh

setup: .venv  ## set up .venv with the tested versions (every target below that needs it does so itself)

test: .venv  ## run the tests, in one process per core
	$(PYTEST)

test-all: .venv  ## run the tests and the full matrices that `make test` leaves out (marked slow)
	$(PYTEST) -m ''

demo: .venv  ## train a baseline and a replaced detector on digit scenes, and compare them
	$(PY) tools/demo.py

lint: .venv  ## check the style (ruff) and the direction of the imports (import-linter)
	$(PY) -m ruff check .
	$(PY) .venv/bin/lint-imports

clean:  ## remove what builds and tests leave behind, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find rl_mmdet tools tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
