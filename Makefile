# `make help` lists what there is. Every target works in the virtual environment .venv, which it makes on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-video test ablation ablation-diffusion ablation-sudoku ablation-terms ablation-video claims imagenet ucf101 clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-20s%s\n", $$1, $$2}'

$(BIN)/elt: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(BIN)/elt ## train a looped generator on handwritten Latin squares, test it at 1 to 6 loops (3 minutes on 2 cores)
	$(BIN)/python -m elt_lightning.reproduce.quickstart

quickstart-video: $(BIN)/elt ## the same for clips: a 3D-VQ tokenizer, then ELT on its tokens, on moving digits (12 minutes on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.quickstart_video

test: $(BIN)/elt ## lint, check types, run the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

ablation: $(BIN)/elt ## ILSD against vanilla looping, unlooped models, other losses and one layer, 3 seeds (about an hour on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation

ablation-diffusion: $(BIN)/elt ## the same for diffusion: ILSD, vanilla looping, the unlooped DiT (about an hour on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation --config experiments/ablation_diffusion.yaml

claims: $(BIN)/elt ## docs/results/README.md: the paper's claims, what was measured, verdicts, at once; RUN=1 first runs the ablations that are missing (their minutes)
ifdef RUN
	$(MAKE) ablation ablation-diffusion ablation-sudoku ablation-terms ablation-video
endif
	$(BIN)/python -m elt_lightning.reproduce.claims

ablation-terms: $(BIN)/elt ## terms of the loss, one layer, loops far beyond training, convergence, little data, 3 seeds (about an hour on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation --config experiments/ablation_terms.yaml

ablation-sudoku: $(BIN)/elt ## ILSD, vanilla looping, students without a teacher, the unlooped model on puzzles of sudoku, 3 seeds (about an hour on 2 cores; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation --config experiments/ablation_sudoku.yaml

ablation-video: $(BIN)/elt ## ILSD against vanilla looping and the unlooped model on clips of moving digits, 3 seeds (under an hour on one core; resumes)
	$(BIN)/python -m elt_lightning.reproduce.ablation --config experiments/ablation_video.yaml

# What `make imagenet` works on; SMOKE=1 draws small pictures, writes random networks in the published formats and trains
# a few steps of small models instead, to see every command run.
IMAGENET ?= data/imagenet
MODELS ?= elt_l_8n3l
SMOKE_DIR := runs/imagenet_smoke
imagenet: $(BIN)/elt ## rows of Tables 1 and 2: IMAGENET=folder VQGAN=file VAE=folder VAL_LABELS=file MODELS=elt_l_8n3l,elt_8n4l TEST_FLAGS="--loops 3" (GPU-hours: docs/imagenet.md); SMOKE=1 in 3 minutes without any
ifdef SMOKE
	rm -rf $(SMOKE_DIR)
	$(BIN)/python tests/imagenet_stand_ins.py $(SMOKE_DIR)/files
	$(BIN)/python -m elt_lightning.reproduce.imagenet --models elt_l_8n3l,elt_8n4l \
		--root $(SMOKE_DIR)/files/imagenet --val_labels $(SMOKE_DIR)/files/val_labels.csv \
		--vqgan $(SMOKE_DIR)/files/vqgan.bin --vae $(SMOKE_DIR)/files/vae --inception $(SMOKE_DIR)/files/inception.pth \
		--reference $(SMOKE_DIR)/files/imagenet/val --data $(SMOKE_DIR)/data --runs $(SMOKE_DIR)/runs \
		--encode_flags "--size 64 --max_unreadable 0.5 --samples_per_shard 10" --flags "$(SMOKE_FLAGS)" \
		--test_flags "--save_samples samples.npz"
else
	$(BIN)/python -m elt_lightning.reproduce.imagenet --models $(MODELS) --runs $(RUNS) $(IMAGENET_FILES)
endif

SMOKE_FLAGS := --data.init_args.batch_size=8 --data.init_args.num_workers=1 --data.init_args.cache=$(SMOKE_DIR)/cache \
	--model.network.init_args.width=64 --model.network.init_args.num_layers=1 --model.sampler.init_args.steps=4 \
	--model.distillation.max_loops=2 --trainer.max_steps=6 --trainer.precision=32-true --trainer.val_check_interval=3 \
	--loop_metrics.num_samples=8 --loop_metrics.num_validation_samples=0 --loop_metrics.batch_size=4 \
	--checkpoint.every_n_train_steps=3

# The same for videos, measured by the paper's protocol; SMOKE=1 writes moving digits in UCF-101's layout and small
# networks with I3D's signature.
UCF101 ?= data/ucf101
VIDEO_CONFIG ?= configs/ucf101/elt_6n4l.yaml
VIDEO_LOOPS ?= 2,3,4,5,6
PROTOCOL_FLAGS ?= --data.init_args.protocol=magvit-10kx4 --num_samples=10000 --repeats=4
VIDEO_SMOKE_DIR := runs/ucf101_smoke
ucf101: $(BIN)/elt ## Table 4's row ELT 6N×4L, and Figure 7: UCF101=folder with UCF-101/ and ucfTrainTestlist/, I3D=file C3D=file (29 GPU-hours, 96 more for the tokenizer); SMOKE=1 in 2 minutes without any
ifdef SMOKE
	rm -rf $(VIDEO_SMOKE_DIR)
	$(BIN)/python tests/ucf101_stand_ins.py $(VIDEO_SMOKE_DIR)/files
	$(BIN)/python -m elt_lightning.reproduce.ucf101 --root $(VIDEO_SMOKE_DIR)/files/videos/UCF-101 \
		--annotations $(VIDEO_SMOKE_DIR)/files/videos/ucfTrainTestlist --loops 1,2,3 \
		--data $(VIDEO_SMOKE_DIR)/data --runs $(VIDEO_SMOKE_DIR)/runs \
		--tokenizer_flags "$(TOKENIZER_SMOKE_FLAGS)" --encode_flags "--size 32 --clips_per_video 2" \
		--data_flags "$(VIDEO_SMOKE_DATA)" --flags "$(VIDEO_SMOKE_FLAGS)"
else
	$(BIN)/python -m elt_lightning.reproduce.ucf101 --root $(UCF101)/UCF-101 --annotations $(UCF101)/ucfTrainTestlist \
		--data $(UCF101) --runs $(VIDEO_RUNS) --config $(VIDEO_CONFIG) --loops $(VIDEO_LOOPS) --test_flags "$(PROTOCOL_FLAGS)" --data_flags "--data.init_args.root=$(UCF101)/UCF-101 --data.init_args.annotations=$(UCF101)/ucfTrainTestlist $(if $(I3D),--data.init_args.i3d_path=$(I3D)) $(if $(C3D),--data.init_args.c3d_path=$(C3D))"
endif

TOKENIZER_SMOKE_FLAGS := --model.init_args.sample_shape=[16,32,32] --model.init_args.filters=32 \
	--model.init_args.multipliers=[1,1,1,1] --model.init_args.residual_blocks=1 --model.init_args.code_channels=8 \
	--model.init_args.num_codes=64 --model.init_args.discriminator_filters=8 \
	--model.init_args.discriminator_multipliers=[1,1] --data.init_args.size=32 --data.init_args.batch_size=2 \
	--data.init_args.micro_batch_size=1 --data.init_args.num_workers=0 --trainer.max_steps=3 \
	--trainer.precision=32-true --trainer.val_check_interval=3 --trainer.limit_val_batches=2
VIDEO_SMOKE_DATA := --data.init_args.root=$(VIDEO_SMOKE_DIR)/files/videos/UCF-101 \
	--data.init_args.annotations=$(VIDEO_SMOKE_DIR)/files/videos/ucfTrainTestlist \
	--data.init_args.i3d_path=$(VIDEO_SMOKE_DIR)/files/i3d.pt --data.init_args.c3d_path=$(VIDEO_SMOKE_DIR)/files/c3d.pt \
	--data.init_args.cache=$(VIDEO_SMOKE_DIR)/cache
VIDEO_SMOKE_FLAGS := --data.init_args.batch_size=8 --data.init_args.micro_batch_size=8 --data.init_args.num_workers=0 \
	--model.network.init_args.width=32 --model.network.init_args.num_layers=1 --model.network.init_args.heads=2 \
	--model.sampler.init_args.steps=4 --model.distillation.max_loops=2 --trainer.max_steps=6 \
	--trainer.precision=32-true --trainer.val_check_interval=3 --loop_metrics.num_samples=8 \
	--loop_metrics.num_validation_samples=0 --loop_metrics.batch_size=4 --checkpoint.every_n_train_steps=3

clean: ## remove caches and the virtual environment; runs and data stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info

# The paper's tables and figures. Each target trains what it lacks where the data are there (VQGAN= or VAE= is given, as
# to `make imagenet`, or UCF101= is a folder), goes on where it was interrupted, and renders what was measured into
# docs/results; without the data it only renders.
# SMOKE=1 takes small models on data that the project makes instead, renders into runs/small_scale, and says so in every
# title. GPU-hours are those of training by `elt plan`, on an H100, and where it says so those of measuring, which
# TEST_FLAGS="--loops 4" makes fewer; of the tokenizer of clips 14.4 TFLOP for each of 9,537 clips in 1,000 epochs
# (benchmarks/README.md), at the same share of the peak.
.PHONY: tables figures table1 table2 table3 table4 table8 fig1 fig4 fig5 fig6 fig7 fig8 fig13 fig14
RUNS ?= runs/imagenet256
VIDEO_RUNS ?= runs/ucf101
BENCHMARKS ?= benchmarks
RESULTS ?= docs/results
SMALL ?= runs/small_scale
TABLE1_MODELS ?= maskgit_l,maskgit_xl,elt_l_8n3l,elt_l_12n2l,elt_xl_7n4l
TABLE2_MODELS ?= dit_16,dit_32,elt_1n32l,elt_4n8l,elt_8n4l,elt_16n2l
IMAGENET_FILES = --root $(IMAGENET) --reference $(or $(REFERENCE),data/imagenet256/VIRTUAL_imagenet256_labeled.npz) \
	$(if $(VQGAN),--vqgan $(VQGAN)) $(if $(VAE),--vae $(VAE)) $(if $(VAL_LABELS),--val_labels $(VAL_LABELS)) \
	$(if $(INCEPTION),--inception $(INCEPTION)) $(if $(TEST_FLAGS),--test_flags="$(TEST_FLAGS)")
ifdef SMOKE
TABLE := $(BIN)/python -m elt_lightning.reproduce.tables --small_scale --output $(SMALL)/tables
FIGURE := $(BIN)/python -m elt_lightning.reproduce.figures --small_scale --output $(SMALL)/figures
table1 table2: RUNS := $(SMOKE_DIR)/runs
table1 table2: $(SMOKE_DIR)/runs/elt_8n4l/test/loops.json
table3 table8: BENCHMARKS := $(SMALL)/benchmarks
BENCH_FLAGS := --scale tiny,tiny_dit --rounds 3 --turn_seconds 0.05
table4: VIDEO_RUNS := $(VIDEO_SMOKE_DIR)/runs
table4: $(VIDEO_SMOKE_DIR)/runs/elt_6n4l/test/loops.json
fig4 fig5 fig8 fig13: RUNS := docs/results
fig7: VIDEO_RUNS := docs/results
fig6: RUNS := $(SMALL)
fig1: $(SMALL)/ilsd/trained $(SMALL)/vanilla/trained
fig6: $(SMALL)/ilsd/trained $(SMALL)/unlooped/trained
fig14: $(SMALL)/diffusion/trained
ILSD_CHECKPOINT := $(SMALL)/ilsd/checkpoints/last.ckpt
VANILLA_CHECKPOINT := $(SMALL)/vanilla/checkpoints/last.ckpt
NORMS_CHECKPOINT := $(SMALL)/diffusion/checkpoints/last.ckpt
NORMS := $(SMALL)/update_norms
else
TABLE := $(BIN)/python -m elt_lightning.reproduce.tables --output $(RESULTS)/tables
FIGURE := $(BIN)/python -m elt_lightning.reproduce.figures --output $(RESULTS)/figures
ILSD_CHECKPOINT := $(RUNS)/elt_4n8l/checkpoints/last.ckpt
VANILLA_CHECKPOINT := $(RUNS)/vanilla/elt_4n8l/checkpoints/last.ckpt
NORMS_CHECKPOINT := $(RUNS)/elt_8n4l/checkpoints/last.ckpt
NORMS := $(RUNS)/elt_8n4l/update_norms
# Training and measuring by $(call masked,models), $(call diffusion,models), or of another mode of ILSD by
# $(call masked,models,mode); with a third argument, --train_only, training alone.
train = $(BIN)/python -m elt_lightning.reproduce.imagenet --models $(1) $(IMAGENET_FILES) $(3) \
	--runs $(RUNS)$(if $(2),/$(2) --flags="--model.distillation.mode=$(2)")
masked = $(if $(VQGAN),$(call train,$(1),$(2),$(3)),@echo "without VQGAN= nothing is trained of $(1) $(2)")
diffusion = $(if $(VAE),$(call train,$(1),$(2),$(3)),@echo "without VAE= nothing is trained of $(1) $(2)")
video = $(if $(wildcard $(UCF101)/UCF-101),$(MAKE) ucf101,@echo "without $(UCF101)/UCF-101 nothing is trained of elt_6n4l")
video_baseline = $(if $(wildcard $(UCF101)/UCF-101),$(MAKE) ucf101 VIDEO_CONFIG=configs/ucf101/magvit_l.yaml VIDEO_LOOPS=1,\
	@echo "without $(UCF101)/UCF-101 nothing is trained of magvit_l")
# The row that is the same model at more loops and steps.
video_24_steps = @if [ -f $(VIDEO_RUNS)/elt_6n4l/checkpoints/last.ckpt -a ! -f $(VIDEO_RUNS)/elt_6n4l/test_24_steps/loops.json ]; \
	then $(BIN)/elt test --ckpt_path $(VIDEO_RUNS)/elt_6n4l/checkpoints/last.ckpt --loops 6 \
	--model.sampler.init_args.steps 24 $(PROTOCOL_FLAGS) --run_dir $(VIDEO_RUNS)/elt_6n4l/test_24_steps; fi
endif

# The small models: the quickstart's, by vanilla looping, without a loop at the same compute, and that of diffusion.
SMALL_CONFIG = configs/quickstart$(if $(filter diffusion,$*),_diffusion).yaml
SMALL_ilsd :=
SMALL_diffusion :=
SMALL_vanilla := --model.distillation.mode=vanilla
SMALL_unlooped := $(SMALL_vanilla) --model.distillation.max_loops=1 --model.network.init_args.num_layers=8
SMALL_FLAGS ?= $(if $(filter diffusion,$*),,--trainer.val_check_interval=200 --loop_metrics.num_validation_samples=200)
$(SMALL)/%/trained: | $(BIN)/elt
	$(BIN)/elt fit --config $(SMALL_CONFIG) $(SMALL_$*) $(SMALL_FLAGS) --run_dir $(@D) \
		$(if $(wildcard $(@D)/checkpoints/last.ckpt),--ckpt_path $(@D)/checkpoints/last.ckpt)
	touch $@

$(SMOKE_DIR)/runs/elt_8n4l/test/loops.json:
	$(MAKE) imagenet SMOKE=1
$(VIDEO_SMOKE_DIR)/runs/elt_6n4l/test/loops.json:
	$(MAKE) ucf101 SMOKE=1

tables: table1 table2 table3 table4 table8 ## all tables
figures: fig1 fig4 fig5 fig6 fig7 fig8 fig13 fig14 ## all figures

table1: $(BIN)/elt ## Table 1, masked ImageNet: IMAGENET= VQGAN= (710 GPU-hours, 19 more to measure; TABLE1_MODELS= for some rows); without them only what is measured; SMOKE=1 in 3 minutes
	$(call masked,$(TABLE1_MODELS))
	$(TABLE) 1 --measured $(RUNS)

table2: $(BIN)/elt ## Table 2, diffusion ImageNet: IMAGENET= VAE= (2,500 GPU-hours, 620 more to measure at all loop counts; TABLE2_MODELS=, TEST_FLAGS=); SMOKE=1 in 3 minutes
	$(call diffusion,$(TABLE2_MODELS))
	$(TABLE) 2 --measured $(RUNS)

table3: $(BIN)/elt ## Table 3, inference throughput: measured unless benchmarks/inference.json is there (a GPU: B to H; a CPU: width 512 in 6 minutes); SMOKE=1 in 1 minute
	@if [ ! -f $(BENCHMARKS)/inference.json ]; then \
		$(BIN)/elt bench inference $(BENCH_FLAGS) --output $(BENCHMARKS)/inference.json; fi
	$(TABLE) 3 --benchmarks $(BENCHMARKS)

table4: $(BIN)/elt ## Table 4, UCF-101: UCF101= I3D= C3D= (58 GPU-hours, 96 more for the tokenizer); SMOKE=1 in 2 minutes
	$(video)
	$(video_24_steps)
	$(video_baseline)
	$(TABLE) 4 --measured $(VIDEO_RUNS)

table8: $(BIN)/elt ## Table 8, training profile: measured unless benchmarks/training.json is there (a GPU: 8N×4L and the 2.1B DiT; a CPU: width 512 in 6 minutes); SMOKE=1 in 1 minute
	@if [ ! -f $(BENCHMARKS)/training.json ]; then \
		$(BIN)/elt bench train $(BENCH_FLAGS) --output $(BENCHMARKS)/training.json; fi
	$(TABLE) 8 --benchmarks $(BENCHMARKS)

fig1: $(BIN)/elt ## samples per loop count, ILSD and vanilla: IMAGENET= VAE= (910 GPU-hours); SMOKE=1 in 12 minutes on 2 cores
	$(call diffusion,elt_4n8l,,--train_only)
	$(call diffusion,elt_4n8l,vanilla,--train_only)
	$(FIGURE) 1 --ilsd $(ILSD_CHECKPOINT) --vanilla $(VANILLA_CHECKPOINT)

fig4: $(BIN)/elt ## FID against compute: the runs of table1; SMOKE=1 from the committed ablation, at once
	$(call masked,$(TABLE1_MODELS))
	$(FIGURE) 4 --measured $(RUNS)

fig5: $(BIN)/elt ## best FID per parameter budget: the runs of table1 and table2; SMOKE=1 from the committed ablation, at once
	$(call masked,$(TABLE1_MODELS))
	$(call diffusion,$(TABLE2_MODELS))
	$(FIGURE) 5 --measured $(RUNS)

fig6: $(BIN)/elt ## convergence beside the 32-layer DiT: IMAGENET= VAE= (1,360 GPU-hours); SMOKE=1 in 10 minutes on 2 cores
	$(call diffusion,dit_32,,--train_only)
	$(call diffusion,elt_16n2l,,--train_only)
	$(call diffusion,elt_8n4l,,--train_only)
	$(FIGURE) 6 --measured $(RUNS)

fig7: $(BIN)/elt ## FVD per loop count: UCF101= I3D= (29 GPU-hours, 96 more for the tokenizer); SMOKE=1 from the committed ablation, at once
	$(video)
	$(FIGURE) 7 --measured $(VIDEO_RUNS)

fig8: $(BIN)/elt ## FID per loop count with and without ILSD: IMAGENET= VQGAN= VAE= (1,150 GPU-hours, 330 more to measure); SMOKE=1 from the committed ablation, at once
	$(call masked,elt_l_8n3l)
	$(call masked,elt_l_8n3l,vanilla)
	$(call diffusion,elt_8n4l)
	$(call diffusion,elt_8n4l,vanilla)
	$(FIGURE) 8 --measured $(RUNS)

fig13: $(BIN)/elt ## terms of the loss: IMAGENET= VQGAN= (480 GPU-hours, 19 more to measure); SMOKE=1 from the committed ablation, at once
	$(call masked,elt_l_8n3l)
	$(call masked,elt_l_8n3l,vanilla)
	$(call masked,elt_l_8n3l,ground_truth)
	$(call masked,elt_l_8n3l,distillation)
	$(FIGURE) 13 --measured $(RUNS)

fig14: $(BIN)/elt ## update of each loop by sampling step: IMAGENET= VAE= (450 GPU-hours); SMOKE=1 in 7 to 12 minutes on 2 cores
	$(call diffusion,elt_8n4l,,--train_only)
	@if [ -f $(NORMS_CHECKPOINT) ]; then \
		$(BIN)/python -m elt_lightning.reproduce.update_norms --ckpt_path $(NORMS_CHECKPOINT) --output $(NORMS); fi
	$(FIGURE) 14 --norms $(NORMS)/update_norms.csv
