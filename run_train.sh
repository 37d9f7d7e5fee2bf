#!/usr/bin/env bash
# Train: the debug model on embedded data, or any job.
#
#   ./run_train.sh [--section.field value ...]          --help lists every option
#
#   CONFIG_FILE   TOML job (train_configs/vlm_debug.toml); a --job.config_file among the options wins over it
#   NGPU          processes on this machine (the visible GPUs; 1 on CPU)
#   LOG_RANK      ranks whose lines are printed, for example 0,1 (0)
#   DRY_RUN=true  check everything, build on the meta device, read one batch, print sizes, train nothing
#   VENV          virtual environment to use (see scripts/environment.sh)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT         several machines: start this on each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

refuse() { # refuse MESSAGE: a variable is wrong
    echo "error: $1" >&2
    exit 2
}
require_number() { # require_number NAME VALUE LEAST
    case $2 in '' | *[!0-9]* | 0?*) refuse "$1 = $2: expected a whole number >= $3" ;; esac
    if [ "$2" -lt "$3" ]; then refuse "$1 = $2: expected a whole number >= $3"; fi
}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
require_number NGPU "${NGPU:-0}" 0
require_number NNODES "$NNODES" 1
require_number NODE_RANK "$NODE_RANK" 0
if [ "$NODE_RANK" -ge "$NNODES" ]; then refuse "NODE_RANK = $NODE_RANK: must be below NNODES ($NNODES), since it counts from 0"; fi
if [ "$NNODES" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then refuse "NNODES = $NNODES needs MASTER_ADDR, the address of the first machine"; fi
case ${DRY_RUN:-} in
    1 | [Tt]rue | TRUE | [Yy]es | YES) dry_run=1 ;;
    '' | 0 | [Ff]alse | FALSE | [Nn]o | NO) dry_run=0 ;;
    *) refuse "DRY_RUN = $DRY_RUN: expected true, yes or 1, or else false, no or 0" ;;
esac

. scripts/environment.sh
find_python

if [ -z "${NGPU:-}" ]; then NGPU=$("$PYTHON" torchtitan/config/devices.py); fi
if [ "$NGPU" = 0 ]; then NGPU=1; fi
export LOG_RANK=${LOG_RANK:-0}
options=(--job.config_file "${CONFIG_FILE:-train_configs/vlm_debug.toml}" "$@")
if [ "$dry_run" = 1 ]; then options+=(--job.dry_run); fi
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

meet=()
if [ "$NNODES" -gt 1 ]; then
    meet=(--machines "$NNODES" --machine "$NODE_RANK" --address "$MASTER_ADDR" --port "${MASTER_PORT:-29500}")
fi
exec "$PYTHON" -m torchtitan.launch --processes "$NGPU" ${meet[@]+"${meet[@]}"} experiments "${options[@]}"
