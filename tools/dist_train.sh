#!/usr/bin/env bash
# Train on several processes of this machine, or of several machines, through torchrun.
#   dist_train.sh CONFIG GPUS [options of train.py]
# Environment: NNODES, NODE_RANK, MASTER_ADDR, PORT for several machines; PYTHON, the interpreter.
set -euo pipefail

if (( $# < 2 )); then
    echo "usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=29500] ${0##*/} CONFIG GPUS [options of train.py]" >&2
    exit 1
fi
config=$1 gpus=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$gpus" \
    "$root/tools/train.py" "$config" --launcher pytorch "$@"
