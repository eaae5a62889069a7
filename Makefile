# `make help` lists what there is. Every target works in the virtual environment .venv, which it makes on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
REPRODUCE := $(BIN)/python -m elt_lightning.reproduce

# What a user may set (docs/reproducing.md): flags of `python -m elt_lightning.reproduce`, whose names are the same.
VARIABLES := IMAGENET VAL_LABELS VQGAN VAE INCEPTION REFERENCE MODELS TEST_FLAGS RUNS UCF101 I3D C3D TOKENIZER \
	TOKENIZER_PATH DATA VIDEO_CONFIG VIDEO_LOOPS PROTOCOL_FLAGS VIDEO_RUNS BENCHMARKS RESULTS SMALL
GIVEN = $(strip $(foreach name,$(VARIABLES),$(if $($(name)),--$(name)='$($(name))')) $(if $(SMOKE),--smoke))
UNKNOWN := $(filter-out $(VARIABLES) SMOKE RUN PAPER TRAIN_TOKENIZER PYTHON VENV BIN, \
	$(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
$(if $(strip $(UNKNOWN)),$(error there is no variable $(strip $(UNKNOWN)); there are $(VARIABLES) SMOKE RUN PAPER TRAIN_TOKENIZER PYTHON))

TABLES := table1 table2 table3 table4 table8
FIGURES := fig1 fig4 fig5 fig6 fig7 fig8 fig13 fig14
EXPERIMENTS := $(subst _,-,$(patsubst experiments/%.yaml,%,$(filter-out %/any_time.yaml,$(wildcard experiments/*.yaml))))

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-video fashion any-time test test-all claims imagenet ucf101 tables figures clean \
	$(EXPERIMENTS) $(TABLES) $(FIGURES)

help: ## show this list
	@grep -hE '^[a-z][^:=]*:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-18s%s\n", $$1, $$2}'
	@echo "Minutes and GPU-hours, and what can be set: docs/reproducing.md. SMOKE=1 runs any table or figure on small models."

$(BIN)/elt: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(BIN)/elt ## train a looped generator, test it at 1 to 16 loops (6 minutes); PAPER=1 without recall
	$(BIN)/python -m elt_lightning.reproduce.quickstart $(if $(PAPER),--paper)

quickstart-video: $(BIN)/elt ## the same for clips of moving digits (10 minutes on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.quickstart_video $(if $(PAPER),--paper) $(if $(TRAIN_TOKENIZER),--train_tokenizer)

fashion: $(BIN)/elt ## real pictures, Fashion-MNIST: tokenizer, masked and diffusion ELT (46 minutes); SMOKE=1
	$(BIN)/python -m elt_lightning.reproduce.fashion $(if $(SMOKE),--smoke)

test: $(BIN)/elt ## lint, check types, run the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal; tested=$$?; \
	wait $$types || { echo 'mypy found errors: see above'; exit 1; }; exit $$tested

test-all: test ## the slow tests too
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --numprocesses auto --maxprocesses 4 --dist worksteal

ablation: ## ILSD against others, 3 seeds (an hour); so every file of experiments/: ablation-video, …
$(EXPERIMENTS): $(BIN)/elt
	$(BIN)/python -m elt_lightning.reproduce.ablation --config experiments/$(subst -,_,$@).yaml

any-time: $(BIN)/elt ## quality against compute, of the runs of recall, recall-sudoku, … at many settings (resumes)
	$(BIN)/python -m elt_lightning.reproduce.any_time

claims: $(BIN)/elt $(if $(RUN),$(EXPERIMENTS)) ## the paper's claims, what was measured, verdicts; RUN=1 runs what is missing
	$(BIN)/python -m elt_lightning.reproduce.claims

imagenet: $(BIN)/elt ## rows of Tables 1 and 2, from pictures on: IMAGENET= VQGAN= VAE= MODELS=
	$(REPRODUCE) imagenet $(GIVEN)

ucf101: $(BIN)/elt ## Table 4's row ELT 6N×4L, from videos on: UCF101= I3D= C3D=
	$(REPRODUCE) ucf101 $(GIVEN)

$(TABLES): table%: $(BIN)/elt
	$(REPRODUCE) table $* $(GIVEN)

$(FIGURES): fig%: $(BIN)/elt
	$(REPRODUCE) figure $* $(GIVEN)

tables: $(TABLES) ## all tables of the paper, or one: table1, table2, table3, table4, table8

figures: $(FIGURES) ## all figures, or one: fig1, fig4, fig5, fig6, fig7, fig8, fig13, fig14

clean: ## remove caches and the virtual environment; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
