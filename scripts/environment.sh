# Sourced by run_train.sh and run_tests.sh, in the repository root: sets PYTHON to one that has what is needed.
#
#   VENV=folder   use this virtual environment and no other; it is made where it is missing
#
# Without VENV: the active Python if it has everything, else .venv, which is made and filled on first use.

has_everything() { # has_everything PYTHON [EXTRA ...]
    command -v "$1" > /dev/null && "$1" scripts/missing_packages.py "${@:2}" > /dev/null 2>&1
}

newest_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer was found" >&2
    return 1
}

fill_environment() { # fill_environment FOLDER: make it if it is missing, and install what training, tests and scripts need
    local base
    if [ ! -x "$1/bin/python" ]; then
        base=$(newest_python) || return 1
        "$base" -m venv "$1" || return 1
    fi
    echo "Installing packages into $1 (once, some minutes)" >&2
    # Without an NVIDIA GPU a fixed torch goes first, so that a smaller CPU build is taken wherever pip is offered one.
    if [ "$("$1/bin/python" torchtitan/config/devices.py)" = 0 ]; then
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 || return 1
    fi
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check -e '.[dev]' || return 1
}

find_python() { # find_python [EXTRA ...]: sets PYTHON
    local folder=${VENV:-.venv}
    if [ -z "${VENV:-}" ]; then
        for PYTHON in python python3; do
            if has_everything "$PYTHON" "$@"; then return; fi
        done
    fi
    PYTHON=$folder/bin/python
    has_everything "$PYTHON" "$@" || fill_environment "$folder"
}
