"""`torchtitan-vlm generate`: answers of a run's checkpoint, alone on standard output or in a file."""

import json
import re

import pytest

from experiments.__main__ import main as train
from experiments.commands import main
from tests.samples import jpeg, write_jsonl

SMALL = [
    "--training.dataset", "cc12m", "--training.dataset_path", "embedded:captions/train",
    "--training.steps", "2", "--training.seq_len", "256", "--training.global_batch_size", "2",
    "--data.patches_per_row", "128", "--data.max_patches_per_image", "64", "--metrics.no_enable_tensorboard",
    "--metrics.no_save_plot", "--validation.no_enable", "--validation.no_controls",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps, and its options."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--job.config_file", "vlm_debug", *SMALL, "--job.dump_folder", str(folder)]
    assert train([*options, "--checkpoint.enable", "--checkpoint.interval", "1"]) == 0
    (folder / "a.jpg").write_bytes(jpeg(40, 60))
    (folder / "b.jpg").write_bytes(jpeg(30, 30, seed=1))
    return folder


def generate(run, *options: str) -> int:
    return main(["generate", "--job.dump_folder", str(run), "--max_tokens", "12", *options])


def test_the_answer_alone_is_on_standard_output(run, capsys):
    assert generate(run, "--image", str(run / "a.jpg"), "--image", str(run / "b.jpg"), "--prompt", "and") == 0
    first = capsys.readouterr()
    assert generate(run, "--checkpoint", "step-2", "--image", str(run / "a.jpg"), "--image",
                    str(run / "b.jpg"), "--prompt", "and") == 0  # fmt: skip
    assert capsys.readouterr().out == first.out and len(first.out) > 1
    assert generate(run, "--checkpoint", "step-1", "--prompt", "It is", "--temperature", "2") == 0
    assert capsys.readouterr().out != first.out


def test_a_file_is_answered_as_each_line_alone_and_gone_on_with(run, capsys):
    asked = [
        {"prompt": "one", "images": ["a.jpg"]},
        {"id": "b", "prompt": "", "images": ["b.jpg", "a.jpg"]},
        {"id": "gone", "images": ["c.jpg"]},
        {"prompt": "no image"},
    ]
    write_jsonl(run / "in.jsonl", asked)
    out = run / "out.jsonl"
    command = [
        "--input",
        str(run / "in.jsonl"),
        "--out",
        str(out),
        "--sequences",
        "3",
        "--temperature",
        "0.8",
    ]
    assert generate(run, *command) == 0
    lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert lines.keys() == {0, "b", "gone", 3} and capsys.readouterr().out == ""
    assert "c.jpg" in lines["gone"]["error"]
    # Who goes on must ask as before.
    assert generate(run, *command, "--max_tokens", "5") == 2
    told = capsys.readouterr().err
    assert "has answers to other options: max_tokens was " in told and told.count("error:") == 1
    # A kill after one answer, in the middle of the next.
    kept = out.read_text().splitlines()[1]
    out.write_text(kept + "\n" + '{"id": 3, "te')
    assert generate(run, *command, "--sequences", "1") == 0
    again = list(map(json.loads, out.read_text().splitlines()))
    assert json.dumps(again[0]) == json.dumps(json.loads(kept))
    assert {line["id"]: line for line in again} == lines and len(again) == 4


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "nothing to answer"),
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: no such file"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1.0: must be >= 0"),
        (["--prompt", "a", "--checkpoint", "step-9"], "--checkpoint step-9: no complete checkpoint"),
        (["--prompt", "a", "--input", "x.jsonl"], "--input asks by itself"),
        (["--prompt", "a", "--hf", "nowhere"], "--hf = nowhere: no such folder"),
        (["--prompt", "long " * 300], r"the prompt has \d+ tokens"),
    ],
)
def test_what_cannot_be_answered_is_one_line(run, capsys, options, told):
    assert generate(run, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(told, error)


def test_an_exported_folder_answers_as_its_checkpoint_does(run, tmp_path, capsys):
    """Its processor says how large images may be: the job's own 64 patches, and not the default."""
    folder = str(tmp_path / "hf")
    assert main(["to_hf", "--job.dump_folder", str(run), "--checkpoint", "step-2", "--out", folder]) == 0
    (run / "large.jpg").write_bytes(jpeg(400, 300))
    images = ["--image", str(run / "a.jpg"), "--image", str(run / "large.jpg")]
    asked = ["--chat_template", "none", "--max_tokens", "12", "--prompt", "and", *images]
    capsys.readouterr()
    assert main(["generate", "--job.dump_folder", str(run), *asked]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", "--hf", folder, "--training.seq_len", "256", *asked]) == 0
    assert capsys.readouterr().out == expected


def test_an_evaluation_tells_its_scores(run, capsys):
    records = [{"image": name, "question": "What?", "answers": ["none"]} for name in ("a.jpg", "b.jpg")]
    write_jsonl(run / "asked.jsonl", records)
    command = ["evaluate", "--job.dump_folder", str(run), "--task", f"exact_match={run / 'asked.jsonl'}"]
    assert main([*command, "--out", str(run / "scores")]) == 0
    told = capsys.readouterr().out
    assert (
        re.search(r"exact_match +exact_match +0\.00 +0\.00 \.\.\. 0\.00 +2\n", told)
        and "summary.json" in told
    )


@pytest.mark.parametrize("command", ["generate", "evaluate", "serve"])
def test_nobody_is_answered_in_no_sequences(capsys, command):
    asked = {"generate": ["--prompt", "a"], "evaluate": ["--task", "vqa=x"], "serve": []}[command]
    assert main([command, *asked, "--sequences", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: --sequences = 0: must be >= 1"
