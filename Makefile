# Everything runs in .venv, which is made on the first call and again only when the project's files ask for it.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-slow check clean

demo: .venv/installed  ## train, evaluate and register a small model, end to end
	@$(BIN)/python jobs/train_demo.py

test: .venv/installed  ## everything that needs no GPU and no network
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: .venv/installed  ## the long trials too
	@$(BIN)/python -m pytest -m "not gpu"

check: .venv/installed  ## format, lint, types, import contracts, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --warnings
	$(BIN)/lint-imports
	$(BIN)/codespell maskformer pipelines jobs cluster tests README.md Makefile pyproject.toml

.venv/installed: pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@# The oracle of the PQ tests; its declared dependencies are not needed for scoring.
	$(BIN)/python -m pip install --quiet --no-deps panopticapi-lite==0.2.0
	@touch $@

clean:  ## remove the environment and what the demo made
	rm -rf .venv runs
