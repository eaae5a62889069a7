# `make help` lists what there is. Every target works in the virtual environment .venv, which it makes on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint ablation ablation-diffusion imagenet clean

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

# What `make imagenet` works on; SMOKE=1 draws small pictures, writes random networks in the published formats and trains
# a few steps of small models instead, to see every command run.
IMAGENET ?= data/imagenet
MODELS ?= elt_l_8n3l
SMOKE_DIR := runs/imagenet_smoke
imagenet: $(BIN)/elt ## rows of Tables 1 and 2: IMAGENET=folder VQGAN=file VAE=folder VAL_LABELS=file MODELS=elt_l_8n3l,elt_8n4l (GPU-hours: elt plan); SMOKE=1 in 3 minutes without any
ifdef SMOKE
	rm -rf $(SMOKE_DIR)
	$(BIN)/python tests/imagenet_stand_ins.py $(SMOKE_DIR)/files
	$(BIN)/python -m elt_lightning.reproduce.imagenet --models elt_l_8n3l,elt_8n4l \
		--root $(SMOKE_DIR)/files/imagenet --val_labels $(SMOKE_DIR)/files/val_labels.csv \
		--vqgan $(SMOKE_DIR)/files/vqgan.bin --vae $(SMOKE_DIR)/files/vae --inception $(SMOKE_DIR)/files/inception.pth \
		--reference $(SMOKE_DIR)/files/imagenet/val --data $(SMOKE_DIR)/data --runs $(SMOKE_DIR)/runs \
		--encode_flags "--size 64 --max_unreadable 0.5 --samples_per_shard 10" --flags "$(SMOKE_FLAGS)"
else
	$(BIN)/python -m elt_lightning.reproduce.imagenet --models $(MODELS) --root $(IMAGENET) \
		--reference $(or $(REFERENCE),data/imagenet256/VIRTUAL_imagenet256_labeled.npz) $(if $(VQGAN),--vqgan $(VQGAN)) \
		$(if $(VAE),--vae $(VAE)) $(if $(VAL_LABELS),--val_labels $(VAL_LABELS)) $(if $(INCEPTION),--inception $(INCEPTION))
endif

SMOKE_FLAGS := --data.init_args.batch_size=8 --data.init_args.num_workers=1 --data.init_args.cache=$(SMOKE_DIR)/cache \
	--model.network.init_args.width=64 --model.network.init_args.num_layers=1 --model.sampler.init_args.steps=4 \
	--model.distillation.max_loops=2 --trainer.max_steps=6 --trainer.precision=32-true --trainer.val_check_interval=3 \
	--loop_metrics.num_samples=8 --loop_metrics.num_validation_samples=0 --loop_metrics.batch_size=4 \
	--checkpoint.every_n_train_steps=3

clean: ## remove caches and the virtual environment; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
