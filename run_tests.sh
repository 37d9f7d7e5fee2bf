#!/usr/bin/env bash
# Lint, format, types and tests; what CI runs.
#
#   ./run_tests.sh [pytest options]        all but the slow tests
#   ./run_tests.sh --slow [...]            the slow tests alone
#   ./run_tests.sh --newest [...]          with the newest versions that pyproject.toml allows, in .venv-newest
#   ./run_tests.sh --oldest [...]          with its lower bounds, in .venv-oldest (docs/versions.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

versions=tested
case ${1:-} in
    --newest | --oldest)
        versions=${1#--}
        shift
        install_into ".venv-$versions" "$versions"
        PYTHON=.venv-$versions/bin/python
        "$PYTHON" scripts/packages.py installed dev docs
        ;;
    *) find_python dev docs ;;
esac
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
# What old packages say of their types does not hold for later ones.
if [ "$versions" != oldest ]; then "$PYTHON" -m mypy; fi
# Files of tests run at the same time on the cores there are; `-n 0` runs all in this process.
"$PYTHON" -m pytest -n logical --maxprocesses 4 --dist loadfile -m "$marker" "$@"
