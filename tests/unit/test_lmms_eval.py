"""lmms-eval's own command gives our models the scores of ours, in an environment made for it."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from experiments.commands import main
from tests.samples import write_jsonl
from tests.unit.test_generate import picture
from tests.unit.test_generate_command import run  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
LMMS_EVAL = "lmms-eval==0.7.3"  # docs/lmms_eval.md
CHOICES = ["a cat", "two dogs on the road", "none"]
FUNCTIONS = """
from pathlib import Path
from PIL import Image

HERE = Path(__file__).parent

def images(document):
    return [Image.open(HERE / name) for name in document["images"]]

def text(document, lmms_eval_specific_kwargs=None):
    return document["question"]

def messages(document, lmms_eval_specific_kwargs=None):
    shown = [{"type": "image", "url": image} for image in images(document)]
    line_ends = {"type": "text", "text": "\\n"}
    content = [part for image in shown for part in (image, line_ends)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text(document)}]}]

def right(document):
    return document["choices"].index(document["answers"][0])

def answer(document):
    return document["answers"][0]
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_visual: !function functions.images
doc_to_text: !function functions.text
metadata: {{version: 0.0}}
"""
EXACT = """
output_type: generate_until
generation_kwargs: {max_new_tokens: 128, do_sample: false}
doc_to_target: !function functions.answer
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
output_type: multiple_choice
doc_to_target: !function functions.right
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TASKS = {
    "shapes_exact": ("asked", EXACT),
    "shapes_chat": ("asked", EXACT + "doc_to_messages: !function functions.messages\n"),
    "shapes_choice": ("chosen", CHOICE),
}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Python of an environment that sees the packages of this one, and holds lmms-eval as its page says."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    fetched = [*pip, "download", "--quiet", "--no-deps", "--dest", str(folder / "wheels"), LMMS_EVAL]
    if (found := subprocess.run(fetched, capture_output=True, text=True)).returncode:
        pytest.skip(f"no package index: {found.stderr.strip().splitlines()[-1]}")
    for what in (["--no-build-isolation", "-e", f"{ROOT}[lmms]"], ["--no-deps", LMMS_EVAL]):
        done = subprocess.run([*pip, "install", "--quiet", *what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return python


def write(folder: Path, name: str, answers: list[str]) -> None:
    """Records of seven documents, one of two images, for both programs."""
    records = [
        {
            "images": [f"{number}.png"] + ["0.png"] * (number == 3),
            "question": f"What is {number}?",
            "answers": [answer],
            "choices": CHOICES,
        }
        for number, answer in enumerate(answers)
    ]
    (folder / f"{name}.json").write_text(json.dumps(records))
    write_jsonl(folder / f"{name}.jsonl", records)


def evaluated(folder: Path, run: Path, out: str, *tasks: str) -> dict:  # noqa: F811
    asked = [option for task in tasks for option in ("--task", task)]
    model = ["--job.dump_folder", str(run), "--chat_template", "chatml"]
    assert main(["evaluate", *model, *asked, "--out", str(folder / out)]) == 0
    return json.loads((folder / out / "summary.json").read_text())["tasks"]


def predictions(folder: Path, out: str) -> list[str]:
    lines = (folder / out / "exact_match.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.fixture(scope="module")
def task(tmp_path_factory, run):  # noqa: F811
    """A folder of tasks in lmms-eval's form, and what our command says of the same records."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "functions.py").write_text(FUNCTIONS)
    for name, (records, rest) in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{records}.json") + rest)
    for number in range(7):
        (folder / f"{number}.png").write_bytes(picture(8 * (number + 2), 60 - 6 * number, number).data)
    write(folder, "asked", ["unknown"] * 7)
    evaluated(folder, run, "first", f"exact_match={folder / 'asked.jsonl'}")
    said = predictions(folder, "first")
    assert len(set(said)) > 3
    write(folder, "asked", [text if number % 3 else "no" for number, text in enumerate(said)])
    write(folder, "chosen", [CHOICES[number % 3] for number in range(7)])
    files = {"exact_match": "asked", "multiple_choice": "chosen"}
    told = evaluated(folder, run, "ours", *(f"{name}={folder / file}.jsonl" for name, file in files.items()))
    return folder, said, {name: figures["metrics"] for name, figures in told.items()}


def lmms_eval(python: Path, folder: Path, model: Path, processes: int, tasks: str, *options: str):
    """Its results of each task, and its samples of the first."""
    out = folder / f"{model.name} {tasks.partition(',')[0]}"  # its command line splits paths at commas
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        python, *(launcher if processes > 1 else []), "-m", "lmms_eval", "--model", "torchtitan_vlm",
        "--include_path", folder, "--tasks", tasks, "--batch_size", "4", "--log_samples",
        "--output_path", out, "--model_args", *options,
    ]  # fmt: skip
    settings = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | settings | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and list(out.rglob("*results.json")), (
        done.stdout[-2000:] + done.stderr[-4000:]
    )
    (results,) = out.rglob("*results.json")
    (samples,) = out.rglob(f"*samples_{tasks.partition(',')[0]}.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"], lines


def test_a_checkpoint_gets_the_scores_of_our_own_command(python, task, run):  # noqa: F811
    folder, said, ours = task
    model_args = f"pretrained={run},chat_template=chatml"
    tasks = "shapes_exact,shapes_choice"
    results, lines = lmms_eval(python, folder, run, 1, tasks, model_args, "--force_simple")
    assert [line["filtered_resps"].strip() for line in lines] == said
    exact, by_token = ours["exact_match"]["exact_match"], ours["multiple_choice"]["accuracy_by_token"]
    assert 0 < exact["value"] < 100 and 0 < by_token["value"] < 100
    assert 100 * results["shapes_exact"]["exact_match,none"] == pytest.approx(exact["value"])
    assert 100 * results["shapes_choice"]["acc,none"] == pytest.approx(by_token["value"])


def test_a_hugging_face_folder_over_two_processes_gets_them_too(python, task, run):  # noqa: F811
    folder, said, ours = task
    exported = folder / "exported"
    assert main(["to_hf", "--job.dump_folder", str(run), "--out", str(exported)]) == 0
    model_args = f"pretrained={exported},chat_template=chatml,training.mixed_precision_param=float32"
    results, lines = lmms_eval(python, folder, exported, 2, "shapes_chat", model_args)
    assert [line["filtered_resps"].strip() for line in lines] == said
    exact, whole = ours["exact_match"]["exact_match"], ours["multiple_choice"]["accuracy"]
    assert 100 * results["shapes_chat"]["exact_match,none"] == pytest.approx(exact["value"])
    model_args += ",by_token=False"
    results, _ = lmms_eval(python, folder, exported, 2, "shapes_choice", model_args, "--force_simple")
    assert 0 < whole["value"] < 100
    assert 100 * results["shapes_choice"]["acc,none"] == pytest.approx(whole["value"])
