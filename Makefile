PYTHON ?= python3
BIN := .venv/bin

# Compiling for every GPU takes minutes: here only where a driver is. `TIMM_DYNAMIC_CUDA=1 make ...` does it anyway.
export TIMM_DYNAMIC_CUDA ?= $(if $(shell command -v nvidia-smi),1,0)

.PHONY: install demo test lint
install: .venv/installed

# Without build isolation the kernels are built against the torch in .venv, not against another copy of it.
.venv/installed: pyproject.toml setup.py $(wildcard cuda_ops/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja numpy "torch>=2.11"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/timm-dynamic env
	touch $@

demo: install
	mkdir -p demo
	$(BIN)/timm-dynamic digits demo/digits
	$(BIN)/timm-dynamic validate demo/digits --model test_ddf_resnet.digits --pretrained --workers 2 \
		--results-file demo/validate.csv
	OMP_NUM_THREADS=1 ./distributed_train.sh 2 demo/digits --config configs/test_ddf_resnet.digits.yaml --epochs 2 \
		--workers 0 --output demo/train
	$(BIN)/timm-dynamic benchmark --models ddf_mul_resnet50 --baseline static --batch-size 1 \
		--json demo/latency.json --plot demo/latency.png
	@echo "Left under demo/: digits, validate.csv, train (checkpoints, summary.csv), latency.json, latency.png"

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror cuda_ops/*
