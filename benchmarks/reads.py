"""How much of the writing of people whom it never saw does a run of vlm_reads.toml read?

    python -m benchmarks.reads --run outputs/vlm_reads

The held-out strips are read by generating: as they are, blanked, with the pictures of another document, and
squeezed to squares, which the run was not trained on. `digits` is word accuracy: a digit that is wrong,
missing or too many is an error, aligned by edit distance. Expected: close to scikit-learn's SVC on the same
single digits, cut out and centred (97.0 %), which is printed too; less than 1 % exact where the model cannot
see, since 3 in 100 strips are of one digit, which can be guessed; squeezed, strips of seven digits and more
far below.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.vlm.config import Data
from experiments.vlm.evaluate.metrics import METRICS
from experiments.vlm.evaluate.questions import Questions
from experiments.vlm.world.digits import TRAINING, load_digits

TASK = "transcription"
SHORT = 6  # digits of a strip, at most
# 8 x 8 patches: more than the pictures have on average at their own aspect ratios.
SQUARE = ("--data.resize", "square", "--data.max_patches_per_image", "64")
Answers = list[tuple[str, str]]  # what was read, and what is written


def evaluate(run: str, out: Path, options: Sequence[str]) -> None:
    """`torchtitan-vlm evaluate` on the held-out strips; it goes on where it was cut."""
    command = [sys.executable, "-m", "experiments.commands", "evaluate", "--job.dump_folder", run]
    asked = ["--task", f"{TASK}=embedded:reads/heldout", "--out", str(out)]
    subprocess.run([*command, *asked, *options], check=True, stdout=sys.stderr)


def read_answers(out: Path, label: str) -> Answers:
    """The answer to each record in order."""
    file = json.loads((out / "summary.json").read_text(encoding="utf-8"))["tasks"][label]["file"]
    lines = map(json.loads, (out / f"{label}.jsonl").read_bytes().splitlines())
    questions = Questions(file, Data())
    return [(line["prediction"], questions.read(line["id"], pictures=False).answers[0]) for line in lines]


def figures(answers: Answers) -> dict[str, float]:
    """Percent: digits right, and strips without an error, all, short and long ones."""
    short = [pair for pair in answers if len(pair[1].split()) <= SHORT]
    long = [pair for pair in answers if len(pair[1].split()) > SHORT]
    found = {"digits": METRICS["word_accuracy"](*zip(*answers, strict=True)).overall}
    for name, pairs in (("exact", answers), (f"exact, 1-{SHORT}", short), (f"exact, {SHORT + 1}-12", long)):
        found[name] = 100.0 * float(np.mean([said == right for said, right in pairs]))
    return found


def svc_accuracy() -> float | None:
    """Percent of the held-out digits; None without scikit-learn."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        return None
    pictures, labels = load_digits()
    pixels = np.stack([np.asarray(picture)[1:9, 1:9].ravel() for picture in pictures]) * (16 / 255)
    kinds = np.array(list(map(int, labels)))
    fitted = SVC(gamma=0.001).fit(pixels[:TRAINING], kinds[:TRAINING])
    return 100.0 * fitted.score(pixels[TRAINING:], kinds[TRAINING:])


def main() -> None:
    """Prints a table, and the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="dump folder of the run; its latest checkpoint reads")
    parser.add_argument("--out", type=Path, help="answers and pages; default: RUN/reads")
    options = parser.parse_args()
    out = options.out or Path(options.run) / "reads"
    evaluate(options.run, out / "native", ["--controls"])
    evaluate(options.run, out / "squeezed", SQUARE)
    labels = {"native": TASK, "blanked": f"{TASK}-blanked", "shuffled": f"{TASK}-shuffled"}
    rows = {name: figures(read_answers(out / "native", label)) for name, label in labels.items()}
    rows["squeezed"] = figures(read_answers(out / "squeezed", TASK))
    print(f"{'':10}" + "".join(f"{name:>13}" for name in rows["native"]))
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{value:12.1f}%" for value in row.values()))
    svc = svc_accuracy()
    print("SVC on single digits: " + ("pip install scikit-learn" if svc is None else f"{svc:.1f}%"))
    print(json.dumps(rows | {"svc": svc}))


if __name__ == "__main__":
    main()
