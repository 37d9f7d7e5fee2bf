"""Write a new constraints.txt: one torch, and the newest of all else that pyproject.toml allows next to it.

    python3.11 scripts/lock_versions.py [torch==VERSION]        without: the torch of constraints.txt

Downloads little and installs nothing: pip says what it would take. Use the oldest Python that is supported:
what its packages are, newer ones have too. Run ./run_tests.sh, with --slow too, before it is committed.
"""

import json
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "constraints.txt"
EXTRAS = "dev,docs,s3,gcs,hf"
# torch names the versions of its own CUDA packages, and which of its builds is taken depends on the machine.
LEFT_TO_TORCH = re.compile(r"(nvidia|cuda|triton|pytorch-triton)\b")


def resolve(torch: str) -> dict[str, str]:
    """Package -> version that pip would install into an empty environment."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    done = subprocess.run(
        [*command, torch, f".[{EXTRAS}]"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    packages = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return {package["name"]: package["version"].partition("+")[0] for package in packages}


def main() -> None:
    torch = sys.argv[1] if len(sys.argv) > 1 else re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.M)[0]
    versions = resolve(torch)
    chosen = [f"{name}=={versions[name]}" for name in sorted(versions, key=str.lower)]
    chosen = [
        line for line in chosen if not line.startswith("torchtitan-vlm==") and not LEFT_TO_TORCH.match(line)
    ]
    made = f"Python {platform.python_version()}, {date.today()}"
    heading = f"# Tested versions ({made}), written by scripts/lock_versions.py. See docs/versions.md."
    CONSTRAINTS.write_text("\n".join([heading, *chosen, ""]), encoding="utf-8")
    print(f"{len(chosen)} versions in {CONSTRAINTS}; what is new: git diff {CONSTRAINTS.name}")


if __name__ == "__main__":
    main()
