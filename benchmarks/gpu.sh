#!/usr/bin/env bash
# Builds the kernels for this machine's GPU, then tests and measures: benchmarks/gpu.sh [build|tests|ops|models|sparse]...
#
# Wants a GPU, nvcc, and a python3 (or $PYTHON) with torch >= 2.11, timm, pytest and setuptools >= 77; no network. Each
# part takes less than 9 minutes, all together less than 25; each stands alone (the first to run builds, so where time is
# short begin with `gpu.sh build`), and one that was interrupted is run again: `models` goes on where it stopped, `tests`,
# `ops` and `sparse` keep what they have done. JSON goes to benchmarks/results (or $RESULTS), and a table of it comes last.
#
# What the machine lacks can be carried there as a folder of wheels, some 40 MB, that $WHEELS names. They are unpacked
# to build/carried, which comes before what is installed. Where there is a network, for Python 3.12 and torch 2.11:
#   pip download -d build/wheels --only-binary=:all: --python-version 3.12 --no-deps "setuptools>=77,<82" ninja timm \
#     torchvision==0.26.* numpy pillow pyyaml safetensors tqdm packaging pytest pluggy iniconfig pygments \
#     huggingface_hub httpx2 httpcore2 h11 truststore anyio idna click
#   WHEELS=build/wheels benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer
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

unpack() { # a wheel is an archive of what goes on the path, but for programs (ninja)
  local wheel program carried=$PWD/build/carried
  [[ -n ${WHEELS:-} ]] || return 0
  for wheel in "$WHEELS"/*.whl; do
    "$PYTHON" -m zipfile -e "$wheel" "$carried" || exit 2
  done
  for program in "$carried"/*.data/scripts; do
    chmod -R +x "$program"
    PATH=$program:$PATH
  done
  PYTHONPATH=$PYTHONPATH:$carried
}

check_machine() {
  "$PYTHON" - <<'CHECK' || exit 2
import importlib.util as find
import sys

wanted = ("torch", "timm", "torchvision", "huggingface_hub", "numpy", "tqdm", "yaml", "pytest", "setuptools")
missing = [name for name in wanted if find.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: this python3 lacks {', '.join(missing)}; the head of gpu.sh says how to carry them here")
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

build() { # unless it is done: minutes
  local arch stamp=build/gpu.stamp sum
  arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 2
  sum="$arch $("$PYTHON" -c 'import torch; print(torch.__version__)') $(cat setup.py cuda_ops/*/* | sha256sum)"
  if [[ ! -f timm_dynamic/_cuda.so || $(cat "$stamp" 2>/dev/null) != "$sum" ]]; then
    TORCH_CUDA_ARCH_LIST=$arch TIMM_DYNAMIC_CUDA=1 run build 400 "$PYTHON" setup.py -q build_ext --inplace
    [[ ${#failed[@]} == 0 ]] || exit 1
    echo "$sum" >"$stamp"
  fi
  "$PYTHON" -m timm_dynamic.cli env
  "$PYTHON" - <<'CHECK' || exit 1
import sys

from timm_dynamic.ops import backend_info

sys.exit(None if backend_info()["cuda"] == "loaded" else f"gpu.sh: CUDA kernels {backend_info()['cuda']}")
CHECK
}

tests() { # all that are marked `cuda`, and a few under compute-sanitizer
  run tests 525 "$PYTHON" benchmarks/gpu_tests.py --output "$RESULTS/gpu_tests.json"
}

ops() {
  run "share of the roof" 210 "$PYTHON" benchmarks/gpu_roof.py --output "$RESULTS/gpu_roof.json"
  run "ddf against alternatives" 140 "$PYTHON" benchmarks/op_ddf.py --device cuda --output "$RESULTS/op_ddf_cuda.json"
}

models() {
  run models 420 "$PYTHON" benchmarks/models.py --paths --device cuda --minutes 5 --longest 2 --output "$RESULTS/paths_cuda.json"
}

sparse() {
  local dtype
  for dtype in float32 bfloat16; do
    run "sparse execution, $dtype" 100 "$PYTHON" benchmarks/sparse.py --device cuda --dtype "$dtype" --quick \
      --output "$RESULTS/sparse_cuda_$dtype.json"
  done
}

parts=("$@")
[[ $# -gt 0 ]] || parts=(tests ops models sparse)
for part in "${parts[@]}"; do
  case $part in
    build | tests | ops | models | sparse) ;;
    *) echo "gpu.sh: unknown part '$part'; choose from build, tests, ops, models, sparse" >&2 && exit 2 ;;
  esac
done
unpack
check_machine
build
for part in "${parts[@]}"; do
  [[ $part == build ]] || "$part"
done
"$PYTHON" benchmarks/gpu_table.py "$RESULTS"
if [[ ${#failed[@]} -gt 0 ]]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "All parts passed."
