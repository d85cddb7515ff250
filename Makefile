PYTHON ?= python3
BIN := .venv/bin
# Two threads of tests, one of arithmetic each: OpenMP teams that wait for each other are slower.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1
PYTEST_ARGUMENTS ?= -n 2

.PHONY: venv demo serve test lint format clean

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/less-cache demo

serve: venv
	$(BIN)/python -m examples.serve

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist report *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
