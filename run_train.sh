#!/usr/bin/env bash
# Train: the debug model on embedded data, or any job.
#
#   ./run_train.sh [--section.field value ...]          --help lists every option
#
#   CONFIG_FILE   TOML job (train_configs/vlm_debug.toml); a --job.config_file among the options wins over it
#   NGPU          processes on this machine (the visible GPUs; 1 on CPU)
#   LOG_RANK      ranks whose lines are printed, for example 0,1 (0)
#   DRY_RUN=1     check everything, build on the meta device, read one batch, print sizes, train nothing
#   VENV          virtual environment to use (see scripts/environment.sh)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT         several machines: start this on each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh
find_python

if [ -z "${NGPU:-}" ]; then NGPU=$("$PYTHON" torchtitan/config/devices.py); fi
if [ "$NGPU" = 0 ]; then NGPU=1; fi
NNODES=${NNODES:-1}
export LOG_RANK=${LOG_RANK:-0}
options=(--job.config_file "${CONFIG_FILE:-train_configs/vlm_debug.toml}" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then options+=(--job.dry_run); fi
unset RANK LOCAL_RANK WORLD_SIZE
# One core is left to the loader: threads of a trainer that share it wait for each other, spinning (2 to 8 times slower).
cores=$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((cores / NGPU - 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

help=0
for option in "$@"; do
    case $option in -h | --help) help=1 ;; esac
done
if [ $((NGPU * NNODES)) = 1 ] || [ $help = 1 ]; then
    exec "$PYTHON" -m experiments "${options[@]}" # signals reach the trainer itself
fi

# One check before many processes start: its error comes once and at once.
WORLD_SIZE=$((NGPU * NNODES)) "$PYTHON" -c '
import sys
from experiments.__main__ import main
sys.exit(main(sys.argv[1:], train=False))' "${options[@]}"

if [ "$NNODES" = 1 ]; then
    meet=(--standalone) # on a free port
else
    meet=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:?the first machine}" --master_port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run --nproc_per_node "$NGPU" "${meet[@]}" -m experiments "${options[@]}"
