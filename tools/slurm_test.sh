#!/usr/bin/env bash
# Evaluate as a Slurm job, one task per GPU.
#   slurm_test.sh PARTITION JOB CONFIG CHECKPOINT [options of test.py]
# Environment: GPUS (in all), GPUS_PER_NODE, CPUS_PER_TASK, SRUN_ARGS (further options of srun); PYTHON.
set -euo pipefail

if (( $# < 4 )); then
    echo "usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] ${0##*/} PARTITION JOB CONFIG CHECKPOINT [options of test.py]" >&2
    exit 1
fi
partition=$1 job=$2 config=$3 checkpoint=$4
shift 4

gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$(( gpus < 8 ? gpus : 8 ))}
read -ra more <<< "${SRUN_ARGS:-}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec srun --partition="$partition" --job-name="$job" \
    --ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${more[@]+"${more[@]}"} \
    "${PYTHON:-python}" -u "$root/tools/test.py" "$config" "$checkpoint" --launcher slurm "$@"
