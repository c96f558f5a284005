PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Anything that needs a newer set of packages than the last one installed is made again.
INPUTS := pyproject.toml constraints.txt

.PHONY: demo federation test test-slow lint docs format bench bench-peers dist check-dist clean

demo: $(VENV)/.core
	$(BIN)/fedss compare --data glyphs --methods full fedss moments pos-only \
		--rounds 110 --seeds 0 --out runs/demo

# A Flower server and three sites with TLS and node keys, as processes on this machine.
federation: $(VENV)/.flower
	$(BIN)/python examples/federation.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -rs -m "not slow"

# Federations of processes, kills at random moments, fine-tuning on photographs.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -rs -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site in site/, to be opened from the disk; no other host is asked.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The short forms; benchmarks/README.md says how the figures in it were made.
bench: $(VENV)/.core
	for theme in engine distributed scale clients images stacks regimes; do \
		$(BIN)/python benchmarks/$$theme.py --short || exit 1; done

# An sdist, and a wheel made of it, in dist/.
dist: .venv-dist/bin/pyproject-build
	rm -rf dist
	.venv-dist/bin/pyproject-build

# The wheel alone, in an empty environment without extras: README's quickstart, a few rounds of it.
# What is in this folder is not imported.
check-dist: dist
	$(PYTHON) -m venv --clear .venv-check
	.venv-check/bin/pip install --disable-pip-version-check -q -c constraints.txt dist/*.whl
	.venv-check/bin/python -P tests/wheel.py

.venv-dist/bin/pyproject-build:
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --disable-pip-version-check -q build

# Each peer in an environment of its own.
bench-peers: $(VENV)/.core .venv-retrieval/.done .venv-search/.done .venv-pfl/.done .venv-flower/.done .venv-fedjax/.done
	.venv-retrieval/bin/python benchmarks/retrieval.py --short
	.venv-retrieval/bin/python benchmarks/verification.py --short
	.venv-search/bin/python benchmarks/search.py --short
	$(BIN)/python benchmarks/engine.py --classes 964 --rounds 5 \
		$(foreach peer,pfl flower fedjax,--peer $(peer)=.venv-$(peer)/bin/python)

.venv-%/.done: $(INPUTS)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --disable-pip-version-check -q -e ".[peer-$*]" \
		"$$(grep ^torch== constraints.txt)"
	touch $@

clean:
	rm -rf $(VENV) .venv-* runs site build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedss needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python $(INPUTS)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

$(VENV)/.flower: $(VENV)/.core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[flower]"
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[lint]"
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[docs]"
	touch $@
