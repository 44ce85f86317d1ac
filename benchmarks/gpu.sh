#!/usr/bin/env bash
# Builds the kernels for this machine's GPU, then tests and measures: benchmarks/gpu.sh [tests|ops|models|sparse]...
#
# Wants a GPU, nvcc, and a python3 (or $PYTHON) with torch >= 2.11, timm, pytest and setuptools >= 77; no network. Each
# part takes less than 9 minutes and stands alone: one that was interrupted is run again. JSON goes to
# benchmarks/results.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD
mkdir -p "$RESULTS"
failed=()

run() { # run NAME SECONDS COMMAND...: says how it went, remembers failures, goes on
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name: $*"
  if timeout "$limit" "$@"; then
    echo "== $name: done in $((SECONDS - started)) s"
  else
    local status=$?
    echo "== $name: FAILED with status $status$([[ $status == 124 ]] && echo " (stopped after $limit s)")"
    failed+=("$name")
  fi
}

check_machine() {
  "$PYTHON" - <<'CHECK' || exit 2
import importlib.util as find
import sys

missing = [name for name in ("torch", "timm", "pytest", "setuptools") if find.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: this python3 lacks {', '.join(missing)}")
import setuptools
import timm
import torch

if not torch.cuda.is_available():
    sys.exit("gpu.sh: no CUDA device here")
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"gpu.sh: setuptools {setuptools.__version__} cannot read pyproject.toml, 77 can")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}, Python {sys.version.split()[0]}")
CHECK
}

build() {
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 2
  TORCH_CUDA_ARCH_LIST=$arch TIMM_DYNAMIC_CUDA=1 run build 300 "$PYTHON" setup.py -q build_ext --inplace
  "$PYTHON" -m timm_dynamic.cli env
  [[ ${#failed[@]} == 0 ]] || exit 1
}

tests() {
  local suite=tests/ops/test_ddf_cuda.py pytest=("$PYTHON" -m pytest -p no:cacheprovider)
  run "operator tests" 240 "${pytest[@]}" -m cuda "$suite"
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer is not on the PATH: no memcheck, no racecheck"
    return
  fi
  # Without torch's cache of memory every tensor has an allocation of its own, whose end memcheck knows.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run memcheck 130 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "${pytest[@]}" -x "$suite" -k "test_random_cases and full-full or test_shapes_layouts_dtypes and float32"
  run racecheck 130 compute-sanitizer --tool racecheck --error-exitcode 1 \
    "${pytest[@]}" -x "$suite" -k "test_random_cases and full-full"
}

ops() {
  run "share of the roof" 260 "$PYTHON" benchmarks/gpu_roof.py --output "$RESULTS/gpu_roof.json"
  run "operator against alternatives" 260 "$PYTHON" benchmarks/op_ddf.py --device cuda \
    --output "$RESULTS/op_ddf_cuda.json"
}

models() {
  local mode
  for mode in eval train; do
    run "models, $mode" 260 "$PYTHON" benchmark_latency.py --device cuda --mode "$mode" --amp --amp-dtype bfloat16 \
      --channels-last --models ddf_mul_resnet50 --baseline static --batch-size 1 32 128 \
      --json "$RESULTS/ddf_resnet50_cuda_$mode.json"
  done
  run "weight-dynamic models" 500 "$PYTHON" benchmarks/models.py --device cuda --output "$RESULTS/models_cuda.json"
}

sparse() {
  local suite=tests/ops/test_sparse_cuda.py pytest=("$PYTHON" -m pytest -p no:cacheprovider) tool dtype
  run "tests of sparse execution" 120 "${pytest[@]}" -m cuda "$suite"
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool of sparse execution" 60 compute-sanitizer --tool "$tool" \
        --error-exitcode 1 "${pytest[@]}" -x "$suite" \
        -k "(test_mask_logits or TestRows) and float32 and not 1030 or test_tables"
    done
  fi
  for dtype in float32 bfloat16; do
    run "sparse execution, $dtype" 140 "$PYTHON" benchmarks/sparse.py --device cuda --dtype "$dtype" --quick \
      --output "$RESULTS/sparse_cuda_$dtype.json"
  done
}

parts=("$@")
[[ $# -gt 0 ]] || parts=(tests ops models sparse)
for part in "${parts[@]}"; do
  case $part in
    tests | ops | models | sparse) ;;
    *) echo "gpu.sh: unknown part '$part'; choose from tests, ops, models, sparse" >&2 && exit 2 ;;
  esac
done
check_machine
build
for part in "${parts[@]}"; do "$part"; done
if [[ ${#failed[@]} -gt 0 ]]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "All parts passed."
