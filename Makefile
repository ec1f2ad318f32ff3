# `make` alone lists what there is. Needs Python 3.11 to 3.13 (with venv and pip), make and a C++
# compiler; everything else goes into .venv, at the exact versions of constraints.txt.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
VENV := .venv
PY := $(VENV)/bin/python
# Without setuptools' warning that an editable installation is one.
INSTALL := PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two workers. A test file stays on one worker, so what its fixtures build is built once.
PYTEST := $(PY) -m pytest -n 2 --dist loadscope
# Folders with Python code besides the package, where they exist.
SCRIPTS := $(wildcard tests examples benchmarks)

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.dev ## compile LeNet-5 for two accelerators, run it on real digits, print one table
	$(PY) examples/lenet_digits/demo.py

.PHONY: test
test: $(VENV)/.dev browser ## run the fast tests
	$(PYTEST) -m "not slow"

.PHONY: browser
browser: $(VENV)/.dev ## get a browser for the tests of pages, if the machine has none (needs npm)
	@$(PY) -m tests.browser || true # without one these tests skip, and say so

.PHONY: test-slow
test-slow: $(VENV)/.examples browser ## run the slow tests: real models, training (needs PyTorch)
	$(PYTEST) -m slow

.PHONY: lint
lint: $(VENV)/.dev ## check style and formatting with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.PHONY: types
types: $(VENV)/.dev ## check types with mypy, strictly
	@# mypy cannot follow the import hook of an editable install, and the folders are not named as
	@# they are imported. So it gets a package made of links; made again each time, as files come
	@# and go.
	rm -rf build/types
	mkdir -p build/types/bitwright
	ln -s $(foreach folder,passes quant search targets,../../../$(folder)) build/types/bitwright/
	ln -s $(addprefix ../../../,$(filter-out %/__pycache__,$(wildcard driver/*))) build/types/bitwright/
	$(PY) -m mypy
	$(PY) -m mypy --explicit-package-bases $(SCRIPTS)

.PHONY: format
format: $(VENV)/.dev ## format the code and repair what ruff can repair
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.PHONY: clean
clean: ## remove what was built; the virtual environment stays
	rm -rf build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment. An unusable one (half made, or its Python gone) is made again.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 to 3.13" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13: say which with make PYTHON=..." >&2; exit 1; }
	$(PY) -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.created
	$(INSTALL) -e '.[dev]'
	touch $@

# PyTorch is large, and only a few slow tests and the training script need it; so is what ZigZag
# brings.
$(VENV)/.examples: pyproject.toml constraints.txt | $(VENV)/.dev
	$(INSTALL) -e '.[dev,examples,zigzag]'
	touch $@
