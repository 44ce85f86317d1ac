#!/usr/bin/env bash
# distributed_train.sh N DATA [flags of train.py]: train on this machine with N processes, one a GPU.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: distributed_train.sh N DATA [flags of train.py], with N processes from 1 on" >&2
    exit 2
fi
processes=$1
shift
python=$here/.venv/bin/python
[[ -x $python ]] || python=python3
exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" "$here/train.py" "$@"
