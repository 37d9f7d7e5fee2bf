#!/usr/bin/env bash
# Train: the debug model on embedded data, or any job.
#
#   ./run_train.sh [--section.field value ...]          --help lists every option, --help data a section
#
#   VENV          virtual environment to use (see scripts/environment.sh)
#   CONFIG_FILE, NGPU, LOG_RANK, DRY_RUN, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh
find_python
exec "$PYTHON" -m experiments.commands train "$@"
