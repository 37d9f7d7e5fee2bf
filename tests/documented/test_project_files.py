"""Dockerfile, workflow, citation and changes fit the project. None of them can be run here."""

import fnmatch
import re
import shlex
import tomllib

import yaml

from tests.documented.look_only import pip
from tests.documented.pages import REPOSITORY
from tests.unit.test_installed import SOURCES
from torchtitan import __version__

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions() -> list[list[str]]:
    text = re.sub(r"\\\n", " ", (REPOSITORY / "Dockerfile").read_text())
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_made_of_all_that_the_wheel_needs_and_of_what_is_sent():
    copied = {name for word, *names in instructions() if word == "COPY" for name in names[:-1]}
    assert copied == {*SOURCES, "constraints.txt"}
    assert all((REPOSITORY / name).exists() for name in copied)
    sent = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert set(sent) == copied


def test_the_image_installs_the_tested_versions_and_starts_a_command_that_there_is(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (install,) = [words[1:] for words in instructions() if words[:2] == ["RUN", "pip"]]
    assert "--constraint" in install and pip(install) == ""
    (start,) = [words[1:] for words in instructions() if words[0] == "ENTRYPOINT"]
    assert start[0].strip("[]") in PROJECT["scripts"]
    (base,) = [words[1] for words in instructions() if words[0] == "FROM"]
    version = re.search(r"python:(3\.\d+)", base)[1]
    assert f"Python {version}." in (REPOSITORY / "constraints.txt").read_text().splitlines()[0]


def test_the_workflow_runs_what_ci_runs_and_builds_the_site():
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in runs and "mkdocs build --strict" in runs
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o100
    (install,) = [shlex.split(run) for run in runs if run.startswith("pip ")]
    needed = {re.match(r"[\w-]+", line)[0] for line in PROJECT["optional-dependencies"]["docs"]}
    assert needed <= set(install) and "constraints.txt" in install
    actions = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(fnmatch.fnmatch(action, "actions/*@v[0-9]*") for action in actions)


def test_citation_and_changes_are_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__ and citation["license"] == PROJECT["license"]
    assert f"\n## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
