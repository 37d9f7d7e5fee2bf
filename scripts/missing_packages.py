"""Print what this Python lacks to run the project; exit 1 if anything. Standard library alone, since nothing may be there yet.

python scripts/missing_packages.py [EXTRA ...]        # extras of pyproject.toml, for example dev
"""

import re
import sys
from importlib import metadata
from pathlib import Path

OPERATORS = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b}


def numbers(version):
    """(2, 13, 0) of "2.13.0+cpu", as far as the bounds in pyproject.toml need it."""
    return tuple(int(part) for part in (re.findall(r"\d+", version.partition("+")[0]) + ["0", "0"])[:3])


def fault(requirement):
    """What is wrong with an installed package, or None."""
    name, bounds = re.match(r"([\w.-]+)\s*(.*)", requirement).groups()
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    for sign, bound in re.findall(r"(>=|<|==|!=)\s*([\d.]+)", bounds):
        if not OPERATORS[sign](numbers(installed), numbers(bound)):
            return f"{name} {installed} is not {sign} {bound}"
    return None


def main(extras):
    if sys.version_info < (3, 11):  # noqa: UP036 (an older Python is what this line is for)
        print(f"Python {sys.version.split()[0]} is older than 3.11")
        return 1
    import tomllib  # Python 3.11

    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    faults = [told for told in map(fault, wanted) if told]
    print("\n".join(faults), end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
