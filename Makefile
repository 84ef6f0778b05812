# Everything runs in .venv, which is made on the first call and again only when the project's files ask for it.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test test-slow check format numerics bench constraints clean

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/installed  ## train, evaluate and register a small model: 7 minutes on two cores
	@$(BIN)/python jobs/train_demo.py

test: .venv/installed  ## run every test that needs no GPU and no network
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: .venv/installed  ## run the long tests too
	@$(BIN)/python -m pytest -m "not gpu"

check: .venv/installed  ## check format, lint, types, import contracts and spelling, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --warnings
	$(BIN)/lint-imports
	$(BIN)/codespell --builtin clear,rare,en-GB_to_en-US maskformer pipelines jobs cluster docs tests README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md Makefile pyproject.toml

format: .venv/installed  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

numerics: .venv/installed  ## print hashes of losses and weights, which a refactoring must not change
	@$(BIN)/python jobs/bench/numerics.py

bench: .venv/installed  ## measure the training step against its peers
	@$(BIN)/python jobs/bench/peers.py --repeats 3 --bfloat16 --output docs/bench/$$(date +%F).md

# Not after .venv/installed, which would first install the versions of the old file again.
constraints:  ## write constraints-all.txt from .venv
	@test -x $(BIN)/python || { echo "error: there is no $(BIN)/python. Call \`make test\` first." >&2; exit 2; }
	@frozen="$$($(BIN)/python -m pip freeze --exclude-editable)" || exit; \
	echo "$$frozen" | grep -q '^nvidia-' || { echo "error: the PyTorch in .venv is a build for CPUs, without the nvidia-* packages" \
		"that GPUs need and constraints-all.txt pins. Install PyTorch from PyPI on Linux, then repeat." >&2; exit 2; }; \
	{ echo "# Everything that the tests ran with, on Python 3.11. Names and versions only; written by \`make constraints\`."; \
		echo "$$frozen" | sed -nE 's/^([A-Za-z0-9._-]+==[A-Za-z0-9.]+)(\+.*)?$$/\1/p'; } > $@-all.txt

.venv/installed: pyproject.toml constraints-all.txt Makefile
	@if test -x $(BIN)/python; then echo "Updating .venv."; else \
		$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or \
			sys.exit("error: Python 3.11 is needed, got %d.%d. Use: make PYTHON=python3.11" % sys.version_info[:2])' && \
		echo "Installing PyTorch, Ray, MLflow and the development tools into .venv: about 7 GB on disk." && \
		echo "This takes 3 minutes or more and prints nothing. The demo itself takes about 7 minutes on two cores." && \
		$(PYTHON) -m venv .venv; \
	fi
	@$(BIN)/python -m pip install --quiet -c constraints-all.txt torch torchvision
	@$(BIN)/python -m pip install --quiet -c constraints-all.txt -e ".[dev]"
	@# The oracle of the PQ tests; its declared dependencies are not needed for scoring.
	@$(BIN)/python -m pip install --quiet --no-deps panopticapi-lite==0.2.0
	@touch $@

clean:  ## remove the environment and what the demo made
	rm -rf .venv runs
