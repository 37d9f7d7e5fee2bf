"""What the pages say of files is true of the files, and what is public says what it is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = {
    path.relative_to(ROOT).as_posix()
    for place in ("torchtitan", "experiments", "tests", "scripts", "benchmarks")
    for path in (ROOT / place).rglob("*.py")
}
LINK = re.compile(r"\]\(([^)#:]+)\)")
FILE = re.compile(r"(?<![\w./])((?:[a-z_]+/)*[a-z_]+\.py)\b")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_what_is_there(page):
    assert [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    named = set(FILE.findall(page.read_text()))
    assert {name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in FILES)} == set()


@pytest.mark.parametrize(
    "room",
    [
        "experiments/vlm",
        "experiments/vlm/data",
        "experiments/vlm/data/formats",
        "experiments/vlm/data/sources",
        "experiments/vlm/data/storage",
        "experiments/vlm/evaluate",
        "experiments/vlm/evaluate/metrics",
        "experiments/vlm/generate",
        "experiments/vlm/model",
        "experiments/vlm/prepare",
        "experiments/vlm/view",
        "torchtitan",
        "torchtitan/components",
        "torchtitan/distributed",
        "torchtitan/generation",
        "torchtitan/layers",
        "torchtitan/models/hf",
        "torchtitan/sweep",
        "torchtitan/tune",
    ],
)
def test_a_rooms_front_door_names_every_file(room):
    door = (ROOT / room / "__init__.py").read_text()
    files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    assert {file for file in files if not re.search(rf"\b{file}\b", door)} == set()


def undocumented(body: list[ast.stmt], prefix: str) -> list[str]:
    """Public classes and functions without a docstring, methods too, those of functions apart."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
            if not ast.get_docstring(node):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found += undocumented(node.body, f"{prefix}{node.name}.")
    return found


def test_every_public_definition_has_a_docstring():
    code = [file for file in sorted(FILES) if file.startswith(("torchtitan/", "experiments/"))]
    assert len(code) > 100
    assert [
        name for file in code for name in undocumented(ast.parse((ROOT / file).read_text()).body, f"{file}: ")
    ] == []


def test_a_definition_without_a_docstring_is_found():
    source = (
        "class A:\n    'Says.'\n    def f(self): ...\n    async def g(self): ...\n    def _h(self): ...\n"
    )
    assert undocumented(ast.parse(source + "def _p(): ...\ndef q(): ...\n").body, "") == ["A.f", "A.g", "q"]
