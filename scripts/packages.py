"""What this Python has of the packages in pyproject.toml. Standard library alone: nothing may be there yet.

    packages.py missing [EXTRA ...]     what is missing or out of bounds, and exit code 1; else, in one line,
                                        what differs from the tested versions in constraints.txt
    packages.py oldest [EXTRA ...]      the lower bounds, as constraints for pip
    packages.py installed [EXTRA ...]   what is here, in one line

An EXTRA is one of pyproject.toml's, for example dev.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OPERATORS = {
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def requirements(extras):
    """[(name, [(operator, version), ...]), ...] as declared."""
    import tomllib  # Python 3.11; `main` refuses an older one

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]
    return [split(line) for line in lines]


def split(line):
    """("torch", [(">=", "2.11"), ("<", "2.16")]) of "torch>=2.11,<2.16"."""
    name, bounds = re.match(r"([\w.-]+)\s*(.*)", line).groups()
    return name, re.findall(r"(>=|<|==|!=)\s*([\w.]+)", bounds)


def numbers(version):
    """(2, 13, 0) of "2.13.0+cpu", as far as the bounds in pyproject.toml need it."""
    return tuple(int(part) for part in (re.findall(r"\d+", version.partition("+")[0]) + ["0", "0"])[:3])


def plain(name):
    """A package has many spellings: Jinja2, jinja2; ruamel.yaml, ruamel-yaml."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name):
    """The version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fault(name, bounds):
    """What is wrong with an installed package, or None."""
    version = installed(name)
    if version is None:
        return f"{name} is not installed"
    wrong = [
        f"{sign} {bound}" for sign, bound in bounds if not OPERATORS[sign](numbers(version), numbers(bound))
    ]
    return f"{name} {version} is not {wrong[0]}" if wrong else None


def tested():
    """Package -> version that the tests passed with."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    return {plain(name): version for name, _, version in pins}


def differences(names):
    """One line that names what is not as tested, or nothing."""
    versions = tested()
    here = {name: installed(name).partition("+")[0] for name in names if plain(name) in versions}
    other = [
        f"{name} {here[name]} (tested: {versions[plain(name)]})"
        for name in here
        if here[name] != versions[plain(name)]
    ]
    return [f"other versions than those of constraints.txt: {', '.join(other)}"] if other else []


def oldest(name, bounds):
    """A lower bound as a constraint, or the name alone where there is none."""
    return name + next((f"=={bound}" for sign, bound in bounds if sign == ">="), "")


def main(command, *extras):
    """Print what `command` asks for; the exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python is what this line is for)
        print(f"Python {sys.version.split()[0]} is older than 3.11")
        return 1
    wanted = requirements(extras)
    faults = []
    if command == "oldest":
        lines = [oldest(name, bounds) for name, bounds in wanted]
    elif command == "installed":
        python = f"Python {sys.version.split()[0]}"
        lines = [", ".join([python, *(f"{name} {installed(name)}" for name, _ in wanted)])]
    else:
        faults = [found for found in (fault(name, bounds) for name, bounds in wanted) if found]
        lines = faults or differences(name for name, _ in wanted)
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("missing", "oldest", "installed"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
