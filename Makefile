# Usage: make [help | setup | test | test-all | demo | lint | clean] [PYTHON=python3.11] [STACK=openmmlab]
PYTHON ?= python3
STACK ?= onedl
VENV := .venv$(if $(filter-out onedl,$(STACK)),-$(STACK))
PY := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile

export PYTHON STACK VENV
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help setup test test-all demo lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1\t/p' $(MAKEFILE_LIST)
	@echo '  STACK=openmmlab does the same in .venv-openmmlab, on MMDetection'"'"'s own packages'

setup: $(VENV)/ready  ## set up .venv with the tested versions (targets that need it do so themselves)

$(VENV)/ready: requirements/install.sh $(wildcard requirements/$(STACK)/*) setup.py rl_mmdet/version.py
	requirements/install.sh
	touch $@

test: $(VENV)/ready  ## run the tests, in one process per core (TESTS="FILE ...": those alone)
	$(PYTEST) $(TESTS)

test-all: $(VENV)/ready  ## run the tests and the full matrices that `make test` leaves out (marked slow)
	$(PYTEST) -m ''

demo: $(VENV)/ready  ## train a baseline and a replaced detector on digit scenes, and compare them
	$(PY) tools/demo.py

lint: $(VENV)/ready  ## check the style (ruff) and the direction of the imports (import-linter)
	$(PY) -m ruff check .
	$(PY) $(VENV)/bin/lint-imports

clean:  ## remove what builds and tests leave behind, but not .venv*
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks rl_mmdet tools tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
