#!/usr/bin/env bash
# Lint, format, types and tests; what CI runs.
#
#   ./run_tests.sh [pytest options]        all but the slow tests
#   ./run_tests.sh --slow [...]            the slow tests alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh
find_python dev

marker="not slow"
if [ "${1:-}" = --slow ]; then
    marker=slow
    shift
fi
# Threads of many small tests only get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A cache of compiled kernels shared with other runs has given wrong gradients: each session has its own.
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
export TORCHINDUCTOR_CACHE_DIR
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -m "$marker" "$@"
