#!/usr/bin/env bash
# Installs a wheel into a clean environment for each torch, and runs the operator tests on what was installed:
# tests/check_wheel.sh WHEEL TORCH...
#
# TORCH is what pip shall install: torch==2.11.*, torch for the newest. PYTHON names the interpreter. Needs the package
# index, and room below TMPDIR for one environment at a time (6 GB with a CUDA torch).
set -euo pipefail
[[ $# -ge 2 && -f $1 ]] || { echo "usage: tests/check_wheel.sh WHEEL TORCH...; no file '${1-}'?" >&2 && exit 2; }
wheel=$(realpath "$1")
suite=$(realpath "$(dirname "$0")/ops")
shift
[[ $(stat -c %s "$wheel") -lt 30000000 ]] || { echo "check_wheel.sh: $wheel has 30 MB or more" >&2 && exit 1; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" # such that no source tree is importable

for torch; do
  echo "== $(basename "$wheel") with $torch"
  "${PYTHON:-python3}" -m venv --clear env
  env/bin/pip install --quiet "$torch" "$wheel" pytest hypothesis expecttest
  env/bin/timm-dynamic env
  env/bin/python - <<'CHECK'
from pathlib import Path

import torch

import timm_dynamic

package = Path(timm_dynamic.__file__).parent
assert package.is_relative_to(Path.cwd() / "env"), f"not the installed package: {package}"
for device_type, status in timm_dynamic.backend_info().items():
    usable = (package / f"_{device_type}.so").exists() and (device_type == "cpu" or torch.version.cuda)
    assert (status == "loaded") == bool(usable), f"{device_type} kernels {status}"
CHECK
  env/bin/pytest -p no:cacheprovider "$suite"
done
