"""The commands of the pages: blocks of ```bash, and what stands between backticks and begins as one does."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES = [page for page in PAGES if page.is_file()] + sorted((REPOSITORY / "docs").glob("*.md"))
# Half of the time of all; test_training_commands.py runs them, test_commands.py the others.
TRAINING = {"machines.md", "running.md", "stages.md", "start.md", "sweeps.md"}
# Why a block is not run; `<!-- needs: REASON -->` stands above it. Its options are looked at.
REASONS = {
    "a GPU": "there is none here",
    "the network": "nothing outside is reached, and packages are not installed by a test",
    "several machines": "one is here; several_machines.slurm is rehearsed by a test of its own",
    "somebody": "it ends when somebody ends it",
    "an hour": "it is the whole of the tests, a benchmark, or a long measurement",
    "data of yours": "no such data come with the repository",
    "weights": "published ones, some GB of them",
    "a test of its own": "it says more of it than that it runs",
    "a cluster": "Slurm or Ray, which are not here",
}
FENCE = re.compile(
    r"(?:<!-- needs: (?P<reason>[^`\n]*?) -->\n+)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# An option at least, or it is the name of a command alone.
SPAN = re.compile(
    r"(?<!`)`((?:\w+=\S+ )*(?:\./run_\w+\.sh|torchtitan-vlm|python\S* (?:-m|scripts/))[^`\n]* -[^`\n]*)`"
)
BEGINS = re.compile(
    r"(?:\w+=\S+ )*(?:\./run_|torchtitan-vlm |python\S* (?:-m |scripts/)|pip |docker |sbatch )"
)


@dataclass(frozen=True)
class Block:
    """Some lines of bash. `reason`: why they are not run; empty: they are."""

    page: Path
    line: int
    code: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """In the order of the page. Those of Python are one program, the last block."""
    text = page.read_text(encoding="utf-8")
    found = [
        (m["language"], Block(page, text.count("\n", 0, m.start("code")) + 1, m["code"], m["reason"] or ""))
        for m in FENCE.finditer(text)
    ]
    python = [block for language, block in found if language == "python" and not block.reason]
    program = "".join(block.code for block in python)
    return [block for language, block in found if language == "bash"] + [
        Block(page, first.line, f"python -c {shlex.quote(program)}", "") for first in python[:1]
    ]


def spans(page: Path) -> list[Block]:
    """Commands inside of sentences; their options are looked at."""
    text = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), page.read_text(encoding="utf-8"),
                  flags=re.MULTILINE | re.DOTALL)  # fmt: skip
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], "a sentence") for m in SPAN.finditer(text)]


def hidden(page: Path) -> list[str]:
    """Lines of other blocks that look like commands, and would be run by nobody."""
    lines, inside = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = "" if inside else line
        elif BEGINS.match(line.strip()) and (
            line.startswith("    ") and not inside or inside not in ("", "```bash")
        ):
            lines.append(line)
    return lines
