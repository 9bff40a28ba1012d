# Everything a newcomer needs: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes of one thread each; the tests of a file stay together, since they share what is dear to make.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: setup demo demo-deploy test test-slow test-servers test-long test-all check format up bench lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] < (3, 14), f"Python {sys.version.split()[0]} found, expected 3.11 to 3.13. Set PYTHON=python3.11"'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## Real teachers to a verified edge model on embedded data, with a table and a report
	$(BIN)/stillhouse compress recipes/digits.yaml

demo-deploy: setup  ## The same model to three devices on this machine in rings, then a bad bundle that goes back
	$(BIN)/python -m flows.demo_deploy

test: setup  ## The quick suite: under 10 minutes on 2 cores
	$(TESTS) -m "not slow and not servers and not browser"

test-slow: setup  ## Whole recipes, killed and resumed, and what only a started run finds; CI runs them too
	$(TESTS) -m "slow and not servers and not long and not browser"

test-servers: setup  ## Approvals, news, passwords, databases, comparison with their real servers; CI runs them too
	$(TESTS) -m "servers and not long and not browser"

test-long: setup  ## Nights, kills in every stage and at every system call, clusters: about an hour
	$(TESTS) -m "long and not browser"

test-all: setup  ## Also the slow tests and the real browser
	$(BIN)/python -m pytest

check: setup  ## Format, lint, layers, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

up: setup  ## Prefect server, worker, MLflow UI and deployments
	$(BIN)/stillhouse up

bench: setup  ## Measure what docs/benchmarks.md reports
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/int8_speed.py

lock: setup  ## Write the versions of this environment to constraints.txt
	{ head -2 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable --exclude pip --exclude setuptools; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## Remove the environment, the store and all runs
	rm -rf $(VENV) .stillhouse runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mlruns -mindepth 1 ! -name .gitkeep -delete
