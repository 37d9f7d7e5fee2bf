# Sourced by run_train.sh and run_tests.sh, in the repository root: sets PYTHON to one that has what is needed.
#
#   VENV=folder   use this virtual environment and no other; it is made where it is missing
#
# Without VENV: the active Python if it has everything, else .venv, which is made and filled on first use, with the
# versions of constraints.txt. See docs/versions.md.

# has_everything PYTHON [EXTRA ...]: where its versions are not those that were tested, a line says so
has_everything() {
    local missing
    command -v "$1" > /dev/null && missing=$("$1" scripts/packages.py missing "${@:2}" 2> /dev/null) || return 1
    if [ -n "$missing" ]; then echo "note: $missing" >&2; fi
}

python_among() { # python_among NAME ...: the first that is new enough
    local candidate
    for candidate in "$@"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer was found" >&2
    return 1
}

# install_into FOLDER VERSIONS: what training, tests and scripts need; VERSIONS: tested, newest or oldest
install_into() {
    local base bounds=()
    if [ ! -x "$1/bin/python" ]; then
        if [ "$2" = oldest ]; then
            base=$(python_among python3.11 python3.12 python3.13 python3 python) || return 1
        else
            base=$(python_among python3 python python3.13 python3.12 python3.11) || return 1
        fi
        "$base" -m venv "$1" || return 1
    fi
    case $2 in
        tested) bounds=(--constraint constraints.txt) ;;
        newest) bounds=(--upgrade --upgrade-strategy eager) ;;
        oldest)
            "$1/bin/python" scripts/packages.py oldest dev docs > "$1/oldest.txt" || return 1
            bounds=(--constraint "$1/oldest.txt")
            ;;
    esac
    echo "Installing packages into $1 ($2 versions; the first time takes some minutes)" >&2
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${bounds[@]}" -e '.[dev,docs]'
}

find_python() { # find_python [EXTRA ...]: sets PYTHON
    local folder=${VENV:-.venv}
    if [ -z "${VENV:-}" ]; then
        for PYTHON in python python3; do
            if has_everything "$PYTHON" "$@"; then return; fi
        done
    fi
    PYTHON=$folder/bin/python
    has_everything "$PYTHON" "$@" || install_into "$folder" tested
}
