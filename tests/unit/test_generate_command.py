"""`torchtitan-vlm generate`: answers of a run's checkpoint, alone on standard output or in a file."""

import json
import os
import re

import pytest

from experiments.__main__ import main as train
from experiments.commands import main
from experiments.vlm.generate.answer_file import AnswerFile, read_records
from tests.samples import jpeg, write_jsonl
from torchtitan.config.errors import ConfigError, StorageError

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
        {"id": "q", "question": "What?"},
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
    assert lines.keys() == {0, "b", "gone", 3, "q"} and capsys.readouterr().out == ""
    assert "c.jpg" in lines["gone"]["error"] and "question is not read" in lines["q"]["error"]
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
    assert {line["id"]: line for line in again} == lines and len(again) == 5


def test_who_goes_on_asks_the_checkpoint_that_began(run, capsys):
    write_jsonl(run / "two.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    command = ["--input", str(run / "two.jsonl"), "--out", str(run / "two.out.jsonl")]
    newest, away = run / "checkpoint" / "step-2", run / "away"
    newest.rename(away)
    assert generate(run, *command) == 0
    away.rename(newest)
    assert generate(run, *command) == 2
    assert re.search("checkpoint was .*step-1 and is .*step-2", capsys.readouterr().err)
    assert generate(run, *command, "--checkpoint", "step-1") == 0
    assert generate(run, *command, "--checkpoint", "step-1", "--data.max_patches_per_image", "16") == 2
    assert "data.max_patches_per_image was 64 and is 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "held",
    [
        b"precious notes without a line end",
        b'{"a": 1}\n',
        b'{"id": 1, "prompt": "x"}\n{"id": 2, "pro',
        b"x\n",
    ],
)
def test_a_file_that_holds_no_answers_is_left_as_it_is(tmp_path, held):
    path = tmp_path / "out.jsonl"
    path.write_bytes(held)
    with pytest.raises(ConfigError, match="out.jsonl"):
        AnswerFile(path, True, 1)
    assert path.read_bytes() == held


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": [1]}', r"line 1: the id \[1\] is neither a text nor a number"),
        ('{"id": NaN}', "line 1: the id nan is neither"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: .*recursion"),
        ('{"id": 1}\n\n{"id": 1}', "line 3: the id 1 is there twice"),
    ],
    ids=lambda value: value[:12],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, told):
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=told):
        read_records(tmp_path / "in.jsonl")


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_room(tmp_path, monkeypatch):
    out, write = AnswerFile(tmp_path / "out.jsonl", True, 1), os.write
    out.add(0, 0, {"text": "a"})
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))
    with pytest.raises(StorageError, match="out.jsonl: No space left .* free; the same command goes on"):
        out.add(1, 0, {"text": "b"})
    monkeypatch.undo()
    again = AnswerFile(tmp_path / "out.jsonl", True, 1)
    assert (again.left(0), again.left(1)) == ([], [0])


def test_empty_lines_are_no_records(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\n \n')
    assert [(number, id) for number, id, _ in read_records(tmp_path / "in.jsonl")] == [(0, 0), (1, 1)]


def test_an_id_that_is_half_a_character_is_kept(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "\\ud83d", "prompt": "a"}')
    (_, id, _), out = *read_records(tmp_path / "in.jsonl"), AnswerFile(tmp_path / "out.jsonl", True, 1)
    out.add(id, 0, {"text": "b"})
    assert AnswerFile(tmp_path / "out.jsonl", True, 1).left(id) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--input", __file__, "--out", __file__], "is the file of --input"),
        (["--input", __file__, "--out", "."], "is a folder"),
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
    """Its processor says how large images may be: the job's own 64 patches, and not the default; and its
    template that there were no conversations.
    """
    folder = str(tmp_path / "hf")
    assert main(["to_hf", "--job.dump_folder", str(run), "--checkpoint", "step-2", "--out", folder]) == 0
    (run / "large.jpg").write_bytes(jpeg(400, 300))
    images = ["--image", str(run / "a.jpg"), "--image", str(run / "large.jpg")]
    asked = ["--max_tokens", "12", "--prompt", "and", *images]
    capsys.readouterr()
    assert main(["generate", "--job.dump_folder", str(run), *asked]) == 0
    expected = capsys.readouterr().out
    asked = ["generate", "--hf", folder, "--training.seq_len", "256", *asked]
    assert main(asked) == 0
    assert capsys.readouterr().out == expected
    # A published folder may name more ends than its tokenizer and template do.
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(1024)]}))
    assert main([*asked, "--chat_template", "chatml"]) == 0
    assert capsys.readouterr().out == "\n"
    (tmp_path / "hf" / "chat_template.jinja").unlink()
    assert main(asked) == 2
    assert "has no chat template; say with --chat_template" in capsys.readouterr().err


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
