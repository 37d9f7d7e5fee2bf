"""Tasks over files of every kind: the same figures killed and gone on with, and by the metrics alone."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import commands
from experiments.commands import evaluate as evaluate_command
from experiments.commands.evaluate import Options, asked_tasks, table
from experiments.vlm.config import Data
from experiments.vlm.data.document import Picture
from experiments.vlm.evaluate.asking import Asking
from experiments.vlm.evaluate.evaluation import Evaluation, evaluate
from experiments.vlm.evaluate.questions import Questions
from experiments.vlm.evaluate.tasks import TASKS
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.layout import agreement
from tests.samples import write_jsonl, write_tar
from tests.unit.test_generate import engine, picture, prompter
from tests.unit.test_likelihood import brute
from torchtitan.config.errors import ConfigError, UserError
from torchtitan.config.job import Comm
from torchtitan.distributed.process_group import close_process_group, open_process_group
from torchtitan.generation.engine import Request
from torchtitan.tools.lock import locked
from torchtitan.tools.signals import StopAsked, StopSignals

ABOUT = {"model": "tiny", "chat_template": "chatml"}
LETTERS = ["A", "B", "C"]


@pytest.fixture(autouse=True)
def one_process(tmp_path):
    open_process_group(Comm(), tmp_path)
    yield
    close_process_group()


class OneRank:
    """Stands for the mesh of a process that is alone."""

    leads = True

    class data:
        get_local_rank = staticmethod(lambda: 0)
        size = staticmethod(lambda: 1)


def answering() -> Answering:
    return Answering(engine(3), prompter(), OneRank())


def records() -> list[dict]:
    return [
        {
            "question_id": f"q{number}",
            "image": f"{number}.png",
            "question": f"What is {number}?",
            "answers": [f"answer {number}", "a cat"],
            "choices": ["a cat", f"answer {number}", "none"],
        }
        for number in range(5)
    ]


def write(folder, kind: str) -> str:
    """The same records as a file of this kind."""
    images = [picture(9 + 3 * number, 30 - 4 * number, number).data for number in range(5)]
    for number, image in enumerate(images):
        (folder / f"{number}.png").write_bytes(image)
    path = folder / f"asked.{kind}"
    if kind == "jsonl":
        write_jsonl(path, records())
    elif kind == "parquet":
        held = [
            {**record, "image": {"bytes": image, "path": None}}
            for record, image in zip(records(), images, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(held), path)
    else:
        members = []
        for record, image in zip(records(), images, strict=True):
            told = {name: value for name, value in record.items() if name != "image"}
            members += [(f"{record['question_id']}.png", image)]
            members += [(f"{record['question_id']}.json", json.dumps(told).encode())]
        write_tar(path, members)
    return str(path)


def run(folder, path: str, names: list[str]) -> dict:
    data = Data(cache_folder=str(folder / "cache"))
    out = folder / "out"
    out.mkdir(exist_ok=True)
    asked = answering()
    evaluations = [Evaluation(name, TASKS[name], path, out, asked, data) for name in names]
    return evaluate(evaluations, out, ABOUT, 100)


def test_choices_are_weighed_as_by_brute_force(tmp_path):
    path = write(tmp_path, "jsonl")
    summary = run(tmp_path, path, ["multiple_choice"])
    make, right, by_token = prompter(), [], []
    for number, record in enumerate(records()):
        image = Picture((tmp_path / f"{number}.png").read_bytes())
        turns = [("user", [image, "\n" + record["question"]])]
        totals = []
        for choice in record["choices"]:
            whole = make.answered(turns, choice)
            totals.append(brute(whole, len(make.prompt(turns).ids)))
        right.append(max(range(3), key=lambda i: sum(totals[i])) == 1)
        by_token.append(max(range(3), key=lambda i: sum(totals[i]) / len(totals[i])) == 1)
    told = summary["tasks"]["multiple_choice"]["metrics"]
    assert told["accuracy"]["value"] == pytest.approx(100 * sum(right) / 5)
    assert told["accuracy_by_token"]["value"] == pytest.approx(100 * sum(by_token) / 5)
    assert "95 % interval" in table(summary) and (tmp_path / "out" / "multiple_choice.html").is_file()


def test_a_choice_follows_a_space_where_the_model_knows_no_conversations(tmp_path):
    questions = Questions(write(tmp_path, "jsonl"), Data(cache_folder=str(tmp_path / "cache")))
    make, question = prompter(template=None), questions.read(0)
    asked = Asking(TASKS["multiple_choice"], questions, make)
    ((_, line),) = asked.lines(Answering(engine(1), make, OneRank()), [0])
    begin = len(make.beginning(question.content).ids)
    wholes = [make.beginning([*question.content, f" {choice}"]) for choice in question.choices]
    assert line["logprobs"] == pytest.approx([sum(brute(whole, begin)) for whole in wholes], abs=1e-3)


def test_a_run_that_was_cut_gives_the_same_files(tmp_path):
    names, path = ["vqa", "multiple_choice", "caption"], write(tmp_path, "jsonl")
    whole = run(tmp_path, path, names)
    out = tmp_path / "out"
    expected = {file.name: file.read_bytes() for file in out.iterdir()}
    # As a kill leaves it: one task is done, of the next two records and half a third.
    lines = (out / "multiple_choice.jsonl").read_text().splitlines()
    part = [json.dumps({k: v for k, v in json.loads(line).items() if k != "scores"}) for line in lines[1:3]]
    for name in ("multiple_choice.jsonl", "multiple_choice.html", "caption.jsonl", "summary.json"):
        (out / name).unlink()
    (out / "multiple_choice.part.jsonl").write_text("\n".join(part) + "\n" + part[0][:20])
    assert run(tmp_path, path, names) == whole
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected


def test_perplexity_is_that_of_the_targets_of_training(tmp_path):
    path = tmp_path / "documents.jsonl"
    documents = [
        {"texts": ["one", None, "two words"], "images": [None, "0.png", None]},
        {"texts": ["three"], "images": [None]},
    ]
    (tmp_path / "0.png").write_bytes(picture(20, 12).data)
    write_jsonl(path, documents)
    told = run(tmp_path, str(path), ["perplexity"])["tasks"]["perplexity"]["metrics"]["perplexity"]
    questions = Questions(str(path), Data(cache_folder=str(tmp_path / "cache")), documents=True)
    logprobs = []
    for number in range(2):
        whole = prompter().document(questions.read(number).content)
        logprobs += [p for p, target in zip(brute(whole, 1), whole.targets[1:], strict=True) if target]
    assert told["value"] == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4)


def test_answers_of_two_models_are_not_mixed(tmp_path):
    path = write(tmp_path, "jsonl")
    run(tmp_path, path, ["vqa"])
    with pytest.raises(UserError, match="holds other answers: model was tiny and is another; give another"):
        evaluate([], tmp_path / "out", ABOUT | {"model": "another"}, 10)


def test_answers_to_other_records_or_with_other_options_are_not_mixed(tmp_path):
    first, second = write(tmp_path, "jsonl"), write(tmp_path, "parquet")
    run(tmp_path, first, ["vqa"])
    with pytest.raises(UserError, match="holds other answers: vqa was .*asked.jsonl, 5 .*asked.parquet, 5"):
        run(tmp_path, second, ["vqa"])
    run(tmp_path, second, ["anls"])
    with open(first, "a") as file:
        file.write(json.dumps(records()[0]) + "\n")
    with pytest.raises(UserError, match="asked.jsonl, 5 records and is .*asked.jsonl, 6 records"):
        run(tmp_path, first, ["vqa"])
    for before, now in ((None, 64), (64, 16)):
        about, out = ABOUT | {"options": {"data.max_pixels_per_image": before}}, tmp_path / f"{before}"
        out.mkdir()
        evaluate([], out, about, 10)
        with pytest.raises(UserError, match=f"data.max_pixels_per_image was .* and is {now}"):
            evaluate([], out, about | {"options": {"data.max_pixels_per_image": now}}, 10)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([], "no task"),
        (["vqa"], "must be NAME=FILE"),
        (["vqaa=x"], "no such task.*vqa"),
        (["vqa=nowhere.jsonl"], "no such file"),
        (["vqa=embedded:sees/held"], "no such embedded data.*sees/heldout"),
    ],
)
def test_a_task_that_cannot_be_run_is_told(tmp_path, tasks, told):
    with pytest.raises(ConfigError, match=told):
        asked_tasks(Options(task=tasks, out=str(tmp_path)))


@pytest.mark.parametrize(
    ("task", "record", "told"),
    [
        (
            "multiple_choice",
            {"answers": ["z"], "choices": ["x", "y"]},
            "its answer 'z' is none of its 2 choic",
        ),
        ("multiple_choice", {"answers": ["x"], "choices": ["x", " "]}, "one of its choices is empty"),
        ("vqa", {"answers": []}, "it has no answer"),
        ("caption", {"answers": [None]}, "answers are no texts"),
    ],
)
def test_a_record_that_knows_no_answer_is_named_before_any_is_asked(tmp_path, task, record, told):
    path, good = tmp_path / "asked.jsonl", {"question": "a?", "answers": ["x"], "choices": ["x", "y"]}
    write_jsonl(path, [good, {"question": "a?"} | record])
    with pytest.raises(ConfigError, match=f"asked.jsonl, record 1: .*{told}"):
        run(tmp_path, str(path), [task])
    assert not list((tmp_path / "out").glob("*.part.jsonl"))


def test_an_accuracy_that_can_only_be_zero_is_told(tmp_path, caplog):
    caplog.set_level("INFO", "torchtitan")
    alone = [{"question": "a?", "answers": ["b"]}]
    for records, told in ((alone, 1), ([*alone, {"question": "a?", "answers": ["b", "c"]}], 0)):
        caplog.clear()
        write_jsonl(tmp_path / "asked.jsonl", records)
        (tmp_path / str(told)).mkdir()
        run(tmp_path / str(told), str(tmp_path / "asked.jsonl"), ["vqa"])
        assert sum("where each record has one it is 0" in line for line in caplog.messages) == told


def test_a_file_without_records_is_one_error(tmp_path):
    (tmp_path / "asked.jsonl").touch()
    with pytest.raises(ConfigError, match="asked.jsonl: holds no record"):
        run(tmp_path, str(tmp_path / "asked.jsonl"), ["vqa"])


def test_answers_may_hold_whatever_a_model_writes(tmp_path):
    """Line ends of Unicode, and ids that are no text."""
    path, out, said = tmp_path / "asked.jsonl", tmp_path / "out", "one\u2028two\x85 three"
    out.mkdir()
    write_jsonl(path, [{"question": "a?", "id": "\ud800", "answers": [said]}])
    line = json.dumps({"id": 0, "prediction": said, "ended": "stop"}, ensure_ascii=False)
    (out / "exact_match.part.jsonl").write_text(line + "\n", encoding="utf-8")
    told = run(tmp_path, str(path), ["exact_match"])
    assert told["tasks"]["exact_match"]["metrics"]["exact_match"]["value"] == 100
    assert "<small>\\ud800</small>" in (out / "exact_match.html").read_text()


def spoil(folder) -> None:
    """The image of record 1 ends early, that of record 3 is not there."""
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "3.png").unlink()


def test_an_image_that_cannot_be_read_is_an_empty_answer_and_ends_nothing(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    names, found = ["vqa", "multiple_choice", "mmmu"], {}
    for folder in (good, bad):
        folder.mkdir()
        path = write(folder, "jsonl")
        if folder is bad:
            spoil(folder)
        summary = run(folder, path, names)
        for name in names:
            lines = (folder / "out" / f"{name}.jsonl").read_text().splitlines()
            found[folder, name] = [json.loads(line) for line in lines], summary["tasks"][name]
    for name in names:
        (whole, _), (lines, told) = found[good, name], found[bad, name]
        assert [line for n, line in enumerate(lines) if n not in (1, 3)] == [whole[n] for n in (0, 2, 4)]
        assert "record 1: image" in lines[1]["error"] and "record 3: image 1" in lines[3]["error"]
        assert all(not any(lines[number]["scores"].values()) for number in (1, 3))
        assert told["not_asked"] == {"records": 2, "first": [lines[1]["error"], lines[3]["error"]]}
        for metric, figure in told["metrics"].items():
            assert figure["value"] == pytest.approx(sum(line["scores"][metric] for line in lines) / 5)
            assert figure["records"] == 5
        page = (bad / "out" / f"{name}.html").read_text()
        assert page.count("<img") == 3 and page.count("not asked") == 2
    assert "not asked: 2 records, the first of them" in table(summary)


def test_a_document_that_cannot_be_read_counts_as_none(tmp_path):
    (tmp_path / "0.png").write_bytes(picture(20, 12).data[:60])
    documents = [{"texts": ["one", None], "images": [None, "0.png"]}, {"texts": ["three"], "images": [None]}]
    write_jsonl(tmp_path / "both.jsonl", documents)
    write_jsonl(tmp_path / "one.jsonl", documents[1:])
    both, one = (tmp_path / name for name in ("both", "one"))
    for folder in (both, one):
        folder.mkdir()
    told = run(both, f"{both}.jsonl", ["perplexity"])["tasks"]["perplexity"]
    assert told["metrics"] == run(one, f"{one}.jsonl", ["perplexity"])["tasks"]["perplexity"]["metrics"]
    assert told["not_asked"]["records"] == 1 and told["metrics"]["perplexity"]["records"] == 1
    lines = [json.loads(line) for line in (both / "out" / "perplexity.jsonl").read_text().splitlines()]
    assert [line["scores"].keys() for line in lines] == [set(), {"perplexity"}]


def test_records_that_can_none_of_them_be_asked_are_one_error_and_asked_again_once_mended(tmp_path):
    path = write(tmp_path, "jsonl")
    images = {file: file.read_bytes() for file in tmp_path.glob("*.png")}
    for file in images:
        file.unlink()
    with pytest.raises(UserError, match="vqa: none of 5 records can be asked: .*record 0: image 1"):
        run(tmp_path, path, ["vqa"])
    for file, data in images.items():
        file.write_bytes(data)
    assert "not_asked" not in run(tmp_path, path, ["vqa"])["tasks"]["vqa"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_with_one_line(tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(evaluate_command, "answer", lambda *_: os.kill(os.getpid(), number) or time.sleep(9))
    asked = ["--task", f"vqa={write(tmp_path, 'jsonl')}", "--out", str(tmp_path / "out")]
    assert commands.main(["evaluate", "--job.config_file", "vlm_debug", *asked]) == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}; the same command goes on\n"
    assert signal.getsignal(number) is before


def test_a_signal_ends_tasks_of_a_training_run_between_two_tokens():
    asked = engine(1, agree=agreement(OneRank()))
    signals = StopSignals()
    try:
        answer = asked.answer([Request(0, prompter().beginning(["once"]), max_tokens=9)])
        next(answer)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopAsked):
            next(answer)
    finally:
        signals.close()
    assert asked.rows == [None] and next(asked.answer([Request(0, prompter().beginning(["once"]))]))


def test_a_second_evaluation_of_a_folder_is_refused_while_the_first_runs(tmp_path):
    out = tmp_path / "out"
    asked = ["--task", f"vqa={write(tmp_path, 'jsonl')}", "--out", str(out)]
    hold = "from pathlib import Path; from torchtitan.tools.lock import take_lock; import time\n"
    hold += f"assert take_lock(Path({str(out / 'lock')!r})); print(flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert first.stdout and first.stdout.readline()
    with pytest.raises(UserError, match="--out .*out: another evaluation is writing there"):
        evaluate_command.main(["--job.config_file", "vlm_debug", *asked])
    first.kill()  # leaves no lock
    first.communicate()
    with locked(out / "lock", ""):
        pass
