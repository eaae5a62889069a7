# `make help` lists what there is. Every target works in the virtual environment .venv, which it makes on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint ablation ablation-diffusion clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-20s%s\n", $$1, $$2}'

$(BIN)/elt: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(BIN)/elt ## train a looped generator on handwritten Latin squares, test it at 1 to 6 loops (5 minutes on 2 cores)
	$(BIN)/python -m elt_lightning.reproduce.quickstart

test: $(BIN)/elt ## lint, check types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

ablation: $(BIN)/elt ## ILSD against vanilla looping and unlooped models, 3 seeds (under 50 minutes on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation

ablation-diffusion: $(BIN)/elt ## the same for diffusion: ILSD, vanilla looping, the unlooped DiT (an estimated hour on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation --config configs/ablation_diffusion.yaml

clean: ## remove caches and the virtual environment; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
