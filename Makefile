# One command each, the same by hand and in CI. VENV=... puts the environment elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-fast lint format bench schema clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup            ## fit every family on embedded real data; pictures at the end
	$(BIN)/python launch.py demo

test: setup            ## every test, on all cores; those that need Ray share one cluster
	$(BIN)/python -m pytest -n auto --durations 15

test-fast: setup       ## the tests that need no Ray
	$(BIN)/python -m pytest -n auto -m 'not ray'

lint: setup            ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup           ## speed, sampling, memory and serving, side by side with peers (Spark, pythae, LitServe where installed)
	$(BIN)/python benchmarks/gmm.py
	$(BIN)/python benchmarks/gmm_sampling.py
	$(BIN)/python benchmarks/gmm_memory.py
	$(BIN)/python benchmarks/hmm.py
	$(BIN)/python benchmarks/hmm_memory.py
	$(BIN)/python benchmarks/deep.py
	$(BIN)/python benchmarks/serving.py

schema: setup          ## write the JSON schema that editors check configs with
	$(BIN)/python -c 'import json; from gendist.config import json_schema; print(json.dumps(json_schema(), indent=2))' \
		> configs/spec.schema.json

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .pytest_cache .ruff_cache
