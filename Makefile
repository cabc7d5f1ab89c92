# The verbs of this project. Each is a thin line over `python3 -m qwen3ft.machine.environment`, which makes
# .venv, or over the `qwen3ft` command inside it; where there is no make, type those.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
UV ?= $(shell command -v uv || echo .qwen3ft/tools/bin/uv)
BIN := .venv/bin

# containers like to set this; here it would make every process compile all that it imports
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help ready run test check up down status lock clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

ready:  ## make .venv and install what requirements.lock pins; quick when nothing changed
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=..."; exit 1; }
	@$(PYTHON) -m qwen3ft.machine.environment

run: ready  ## start the servers if need be, fine-tune, show the result
	@$(BIN)/qwen3ft run

test: ready  ## the default test suite; needs no network and no GPU
	HF_HUB_OFFLINE=1 $(BIN)/pytest

check: ready  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

up: ready  ## start the Prefect server, the MLflow server and a worker
	@$(BIN)/qwen3ft up

down: ready  ## stop them, and whatever runs on them
	@$(BIN)/qwen3ft down

status: ready  ## what is up, and where
	@$(BIN)/qwen3ft status

# torch is pinned by hand; hatchling and editables build the project itself. The lock names no index,
# no build of torch for one kind of machine, and none of the CUDA packages that torch brings itself.
lock: ready  ## resolve pyproject.toml anew, within what requirements.lock pins already
	printf 'torch==2.13.0\nhatchling\neditables\n' | $(UV) pip compile pyproject.toml - --extra dev --extra team \
		--python-version 3.11 --no-header --no-annotate --quiet -o requirements.lock
	grep -vE '^(triton|cuda-|nvidia-[^m])' requirements.lock | sed 's/+cpu//' > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ready  ## stop the servers and remove caches; keeps runs, adapters and mlruns
	@$(BIN)/qwen3ft down
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
