"""METEOR by its own program: Java, and the jar that the package pycocoevalcap brings."""

import importlib.util
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.vlm.evaluate.metrics.score import References, Score, pairs
from torchtitan.config.errors import UserError

# As in the published scorer of COCO captions: English, its normalisation, lines in and out.
_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")


def meteor(predictions: Sequence[str], references: References) -> Score:
    """METEOR 1.5 (Denkowski and Lavie, 2014) of tokenised sentences, a fraction; `overall` of the whole set.

    Raises UserError where Java or the package is missing, or the program ends early.
    """
    samples = list(pairs("meteor", predictions, references))
    with _program() as program:
        counts = [
            _ask(program, ["SCORE", *map(_field, texts), _field(prediction)]) for prediction, texts in samples
        ]
        per_sample = [float(_ask(program, ["EVAL", *counts]))]  # a line of each sample, then one of all
        per_sample += [float(_line(program)) for _ in samples[1:]]
        return Score(float(_line(program)), per_sample)


def _field(sentence: str) -> str:
    """`sentence` as one field of a line. A no-break space stays: the program takes it for a letter."""
    return " ".join(sentence.replace("|||", "").splitlines()).replace("  ", " ")


def _ask(program: subprocess.Popen[str], fields: list[str]) -> str:
    assert program.stdin
    with suppress(BrokenPipeError):  # it has ended, as the empty answer shows
        program.stdin.write(" ||| ".join(fields) + "\n")
        program.stdin.flush()
    return _line(program)


def _line(program: subprocess.Popen[str]) -> str:
    assert program.stdout
    line = program.stdout.readline().strip()
    if not line:
        raise UserError(f"meteor: its program ended early; run `{shlex.join(_command())}` to see why")
    return line


def missing() -> str:
    """What this machine lacks for METEOR, and what to do; empty where nothing is."""
    if not shutil.which("java"):
        return "meteor needs Java (no `java` on PATH); install it, or leave the metric out"
    if not _jar():
        return "meteor needs a package: pip install 'torchtitan-vlm[meteor]', or leave the metric out"
    return ""


def _jar() -> Path | None:
    package = importlib.util.find_spec("pycocoevalcap")
    folders = package.submodule_search_locations if package else None
    return Path(folders[0], "meteor", "meteor-1.5.jar") if folders else None


def _command() -> list[str]:
    return ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(_jar()), *_OPTIONS]


@contextmanager
def _program() -> Iterator[subprocess.Popen[str]]:
    """The program, waiting for lines; it ends with the block."""
    if missing():
        raise UserError(missing())
    process = subprocess.Popen(
        _command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    )
    try:
        yield process
    finally:
        process.kill()
        with suppress(BrokenPipeError):  # of what it has not read
            process.communicate()
