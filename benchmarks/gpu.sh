#!/usr/bin/env bash
# Builds the kernels for this machine's GPU, then checks, tests and measures: benchmarks/gpu.sh [PART]...
#
# Parts: build, check, tests, models (all four by default), and sanitize. Wants a GPU, nvcc, and a python3 (or $PYTHON)
# with torch >= 2.11, timm, pytest and setuptools >= 77; no network. All together take less than 14 minutes; each stands
# alone (the first to run builds), and is run again if it was interrupted. What `check` says goes to
# timm_dynamic/measured, from where the package learns which kernels are on; the rest to benchmarks/results. Commit both,
# and the page that `benchmarks/page.py` makes of them.
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
RESULTS=benchmarks/results
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer
export PYTHONPATH=$PWD
mkdir -p timm_dynamic/measured
failed=()

run() { # run NAME SECONDS COMMAND...: says how it went, remembers failures, goes on
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name: $*"
  if timeout -s INT -k 20 "$limit" "$@"; then # as Ctrl-C: pytest then says what failed
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
  sum="$arch $("$PYTHON" -c 'import torch; print(torch.__version__)') $(find setup.py cuda_ops -type f | sort | xargs sha256sum | sha256sum)"
  if [[ ! -f timm_dynamic/_cuda.so || $(cat "$stamp" 2>/dev/null) != "$sum" ]]; then
    TORCH_CUDA_ARCH_LIST=$arch TIMM_DYNAMIC_CUDA=1 run build 300 "$PYTHON" setup.py -q build_ext --inplace
    [[ ${#failed[@]} == 0 ]] || exit 1
    echo "$sum" >"$stamp"
  fi
  "$PYTHON" -m timm_dynamic.cli env
  "$PYTHON" -c 'import sys; from timm_dynamic.ops import kernels; sys.exit(not kernels.is_loaded("cuda"))' || exit 1
}

check() { # every implementation against its formula, right and faster or not
  local name
  name=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()))') || exit 2
  run check 220 "$PYTHON" -m timm_dynamic.cli check --device cuda --batch-size 8 64 --shapes 2 --timeout 40 --minutes 3 \
    --json "timm_dynamic/measured/$name.json"
}

# Those with tests for a GPU: the others need not be importable here.
mapfile -t files < <(grep -rlE 'mark\.cuda|needs_gpu\(' tests --include='test_*.py')
PYTEST=("$PYTHON" -m pytest -p no:cacheprovider -rfE "${files[@]}" -m)

tests() {
  local parallel=()
  "$PYTHON" -c "import xdist" 2>/dev/null && parallel=(-n 8)
  run tests 220 env OMP_NUM_THREADS=2 "${PYTEST[@]}" cuda "${parallel[@]}" --junitxml="$RESULTS/gpu_tests.xml"
}

sanitize() { # without torch's cache of memory every tensor has an allocation, whose end memcheck knows
  run sanitize 300 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 7 \
    "${PYTEST[@]}" "cuda and sanitized"
}

models() { # beside their static twins, in bfloat16 and channels_last, eager and compiled
  run models 160 "$PYTHON" benchmarks/models.py --device cuda --minutes 2 --longest 1.5
}

parts=("$@")
[[ $# -gt 0 ]] || parts=(check tests models)
for part in "${parts[@]}"; do
  case $part in
    build | check | tests | models | sanitize) ;;
    *) echo "gpu.sh: unknown part '$part'; choose from build, check, tests, models, sanitize" >&2 && exit 2 ;;
  esac
done
unpack
check_machine
build
for part in "${parts[@]}"; do
  [[ $part == build ]] || "$part"
done
if [[ ${#failed[@]} -gt 0 ]]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
echo "All parts passed."
