PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Anything that needs a newer set of packages than the last one installed is made again.
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test lint format clean

demo: $(VENV)/.core
	$(BIN)/fedss compare --data glyphs --methods full fedss moments pos-only \
		--rounds 110 --seeds 0 --out runs/demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedss needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python $(INPUTS)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[lint]"
	touch $@
