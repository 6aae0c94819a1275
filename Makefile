# Both commands create what they need: a virtual environment in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow check

quickstart: .venv/installed
	$(BIN)/accel run configs/quickstart.py

test: .venv/installed-dev
	$(BIN)/python -m pytest

# Also the checks that take long or need files which are not in this repository; see the README.
test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow or not slow"

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@
