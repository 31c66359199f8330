# Usage: make [help | setup | test | test-all | demo | docs | docs-links | lint | clean] [PYTHON=python3.11]
#        [STACK=openmmlab]
PYTHON ?= python3
STACK ?= onedl
VENV := .venv$(if $(filter-out onedl,$(STACK)),-$(STACK))
PY := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile

export PYTHON STACK VENV
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help setup test test-all demo docs docs-links lint clean

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

$(VENV)/docs: $(VENV)/ready requirements/docs.txt
	$(PY) -m pip install -q -r requirements/docs.txt -c requirements/$(STACK)/lock.txt
	touch $@

docs: $(VENV)/docs  ## build the documentation into docs/_build/html; a warning or a broken link within it is an error
	$(PY) -m sphinx -q -W --keep-going -b html docs docs/_build/html

docs-links: $(VENV)/docs  ## check the documentation's links to other sites (needs a network)
	$(PY) -m sphinx -q -b linkcheck docs docs/_build/linkcheck

lint: $(VENV)/ready  ## check the style (ruff) and the direction of the imports (import-linter)
	$(PY) -m ruff check .
	$(PY) $(VENV)/bin/lint-imports

clean:  ## remove what builds and tests leave behind, but not .venv*
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find benchmarks rl_mmdet tools tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
