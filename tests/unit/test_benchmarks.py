"""Benchmarks are run by hand; what they import is held by this."""

import importlib
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_benchmark_finds_what_it_imports(file):
    importlib.import_module(f"benchmarks.{file.stem}")
