"""Programs that end with code 0 once their options were found to be good, in place of doing what they do."""

import argparse
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

WITHOUT_OPTIONS = ("lock_versions.py",)
OURS = ("experiments", "torchtitan", "benchmarks")
# Programs that are not ours and cannot be run here: that they are called at all is what is seen of them.
FOREIGN = ("docker", "sbatch", "srun", "torchrun", "lmms_eval", "mkdocs", "jupyter", "ray", "curl")


def install() -> None:
    """In this process, which is about to run a program of ours."""
    import experiments.__main__ as trainer
    from experiments.commands import compare_runs, download_hf_assets, prepare_data
    from torchtitan.config import parse
    from torchtitan.sweep.run import Sweeper

    trainer.ready_job = lambda argv, world_size: _job(argv)  # of the launcher
    Sweeper.run = _then_end(lambda sweeper: None)  # every run's options were checked
    parse.parse_script = _then_end(parse.parse_script)
    for command in (compare_runs, download_hf_assets, prepare_data):
        command.run_tyro = _then_end(command.run_tyro)
    argparse.ArgumentParser.parse_args = _then_end(argparse.ArgumentParser.parse_args)


def _job(argv: Sequence[str]) -> Any:
    from experiments.__main__ import CONFIG_CLASSES
    from torchtitan.config import parse

    return parse.parse(argv, CONFIG_CLASSES)


def _then_end(function: Callable[..., Any]) -> Callable[..., NoReturn]:
    def run(*arguments: Any, **options: Any) -> NoReturn:
        function(*arguments, **options)
        sys.exit(0)

    return run


def module(name: str, options: Sequence[str], stand_ins: Path) -> bool:
    """`python -m name`: whether it is done with, as a job is and what is not ours; else it is to be run."""
    if name == "experiments":
        _job(options)
        return True
    if name == __name__ or name.partition(".")[0] in OURS:  # this one: a program of others, see below
        return False
    assert importlib.util.find_spec(name), f"no module {name}"
    if name == "venv":
        Path(options[-1]).mkdir(parents=True)
        (Path(options[-1]) / "bin").symlink_to(stand_ins)
    return True


def pip(options: Sequence[str]) -> str:
    """What is wrong with the options of `pip install`; empty: nothing."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    for before, option in zip(["", *options], options, strict=False):
        if before in ("-c", "-r", "--constraint") and not Path(option).is_file():
            return f"pip: no file {option}"
        named = re.fullmatch(r"(?:\.|torchtitan-vlm)\[([\w,-]+)\]", option)
        unknown = set(named[1].split(",")) - set(project["optional-dependencies"]) if named else set()
        if unknown:
            return f"pip: no extra {unknown}"
    return ""


if __name__ == "__main__":
    sys.exit((sys.argv[1] == "pip" and pip(sys.argv[2:])) or 0)
