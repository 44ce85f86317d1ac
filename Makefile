PYTHON ?= python3
BIN := .venv/bin

WHEEL_CUDA := $(or $(TIMM_DYNAMIC_CUDA),1)
# Compiling for every GPU takes minutes: here only where a driver is. `TIMM_DYNAMIC_CUDA=1 make ...` does it anyway.
export TIMM_DYNAMIC_CUDA ?= $(if $(shell command -v nvidia-smi),1,0)

.PHONY: install demo test lint docs wheel check-wheel sanitize
install: .venv/installed

# Without build isolation the kernels are built against the torch in .venv, not against another copy of it.
.venv/installed: pyproject.toml setup.py $(wildcard cuda_ops/*/*)
	$(PYTHON) -m venv .venv
	@echo "Installing torch and what else there is to .venv: some 5 GB, minutes without output"
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja numpy "torch>=2.11"
	@echo "Compiling the kernels: minutes without output"
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	$(BIN)/timm-dynamic env
	touch $@

demo: install
	mkdir -p demo
	$(BIN)/timm-dynamic digits demo/digits
	$(BIN)/timm-dynamic validate demo/digits --model test_ddf_resnet.digits --pretrained --workers 2 \
		--results-file demo/validate.csv
	OMP_NUM_THREADS=1 ./distributed_train.sh 2 demo/digits --config configs/test_ddf_resnet.digits.yaml --epochs 2 \
		--warmup-epochs 0 --workers 0 --output demo/train
	$(BIN)/timm-dynamic benchmark --models ddf_mul_resnet50 --baseline static --batch-size 1 \
		--json demo/latency.json --plot demo/latency.png
	$(BIN)/timm-dynamic inspect $$($(BIN)/python -c "from sklearn import datasets as d; print(d.__path__[0])")/images \
		--model dynconv_resnet8.budget50_cifar10 --input-size 3 256 384 --crop-pct 1 --out demo/masks
	@echo "Left under demo/: digits, validate.csv, train (checkpoints, summary.csv), latency.json, latency.png, masks"
	@echo "Next: . .venv/bin/activate"

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror cuda_ops/*/* tests/cuda_on_host/*.cpp tests/cuda_on_host/*.h tests/cuda_on_host/include/*

# The site, in build/site; any warning (a link to nowhere, a name without docstring) is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# For every GPU, wherever it is built; `TIMM_DYNAMIC_CUDA=0 make wheel` leaves the CUDA kernels out. Torch brings its own
# libraries, and the CUDA runtime is linked statically.
wheel: install
	@TIMM_DYNAMIC_CUDA=$(WHEEL_CUDA) $(BIN)/python setup.py --version  # one clear line where there is no CUDA toolkit
	rm -rf build/lib.* build/wheel dist
	TIMM_DYNAMIC_CUDA=$(WHEEL_CUDA) $(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl

# The oldest torch that the wheel serves, and the newest: several GB each, one after the other.
check-wheel:
	PYTHON=$(PYTHON) tests/check_wheel.sh dist/*.whl "torch==2.11.*" torch

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-wrapv -fno-omit-frame-pointer -g1
PRELOAD := $(foreach name,asan ubsan stdc++,$$(c++ -print-file-name=lib$(name).so))
# The CPU operator tests under AddressSanitizer and UndefinedBehaviorSanitizer, once an instruction set.
sanitize: install
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" TIMM_DYNAMIC_CUDA=0 $(BIN)/python setup.py -q build \
		--build-base build/sanitize --build-lib build/sanitize/lib
	cd build/sanitize/lib && for level in avx512 avx2 default; do \
		echo "== $$level"; \
		LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		ATEN_CPU_CAPABILITY=$$level PYTHONPATH=$$PWD OMP_NUM_THREADS=2 \
		$(abspath $(BIN))/pytest $(CURDIR)/tests/ops -k "not (cuda or compile or reference or instruction_sets)" || exit 1; \
	done
