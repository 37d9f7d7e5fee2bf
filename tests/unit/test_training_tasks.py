"""Tasks of a run that trains: its losses are the same without them, and they find what evaluate finds."""

import gc
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments.__main__ import checked_job
from experiments.__main__ import main as train
from experiments.commands import main
from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.data.document import Picture
from experiments.vlm.evaluate.exhibits import exhibit
from experiments.vlm.evaluate.tasks import Question
from experiments.vlm.evaluate.training_tasks import TrainingTasks, open_tasks
from experiments.vlm.generate import layout
from tests.samples import jpeg, write_jsonl
from tests.unit.test_evaluate import write
from tests.unit.test_generate import TOKENIZER, picture, vlm
from tests.unit.test_generate_command import SMALL
from torchtitan import train as training
from torchtitan.components import dump_folder, sinks
from torchtitan.components.dump_folder import begin, go_back
from torchtitan.components.sinks import read_history
from torchtitan.config.errors import ConfigError, UserError
from torchtitan.config.job import Comm, JobConfig
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.process_group import close_process_group, open_process_group

HELD_OUT = ["--validation.enable", "--validation.steps", "1", "--metrics.log_freq", "1"]


def run(folder, *options: str) -> int:
    command = ["--job.config_file", "vlm_debug", *SMALL, *HELD_OUT, "--job.dump_folder", str(folder)]
    return train([*command, *options])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps with tasks after each, the same without, and the file that is asked."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(40 + 20 * number, 60, seed=number))
    records = [
        {"image": f"{number}.jpg", "question": f"What is {number}?", "answers": ["a"], "choices": ["a", "b"]}
        for number in range(5)
    ]
    path = write_jsonl(folder / "asked.jsonl", records)
    tasks = ["--validation.tasks", f"vqa={path}", f"multiple_choice={path}", "--validation.task_freq", "1"]
    saved = ["--checkpoint.enable", "--checkpoint.interval", "1", "--metrics.enable_tensorboard"]
    assert run(folder / "with", *tasks, *saved) == 0
    assert run(folder / "without") == 0
    return folder


def test_losses_are_the_same_without_them(runs):
    told, untold = (read_history(runs / name) for name in ("with", "without"))
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in h if "loss" in r] for h in (told, untold)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    held_out = [[r["validate/loss"] for r in h if "validate/loss" in r] for h in (told, untold)]
    assert held_out[0] == held_out[1]
    figures = [record["step"] for record in told if "validate/multiple_choice/accuracy" in record]
    assert figures == [1, 2] and not any("validate/vqa" in str(record) for record in untold)


def test_figures_and_lines_are_those_of_evaluate_on_the_checkpoint(runs):
    path, out = runs / "asked.jsonl", runs / "evaluated"
    asked = ["--task", f"vqa={path}", "--task", f"multiple_choice={path}", "--out", str(out)]
    folder = runs / "with"
    assert main(["evaluate", "--job.dump_folder", str(folder), "--checkpoint", "step-1", *asked]) == 0
    for name in ("vqa.jsonl", "multiple_choice.jsonl"):
        assert (folder / "tasks" / "step-1" / name).read_bytes() == (out / name).read_bytes()
    evaluated = json.loads((out / "summary.json").read_text())["tasks"]
    assert json.loads((folder / "tasks" / "step-1" / "summary.json").read_text())["tasks"] == evaluated
    (record,) = (r for r in read_history(folder) if r["step"] == 1 and "validate/vqa/vqa_accuracy" in r)
    accuracy = evaluated["multiple_choice"]["metrics"]["accuracy"]["value"]
    assert record["validate/multiple_choice/accuracy"] == accuracy
    assert (folder / "tasks" / "step-2" / "vqa.html").read_text().count("data:image/jpeg") == 5


def test_tensorboard_holds_the_same_pictures_at_each_step(runs):
    events = EventAccumulator(str(runs / "with" / "tb"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    shown = {f"validate/{task}/{n}" for task in ("vqa", "multiple_choice") for n in (0, 1, 2, 3)}
    assert set(events.Tags()["images"]) == shown
    lines = (runs / "with" / "tasks" / "step-2" / "vqa.jsonl").read_text().splitlines()
    for name in shown:
        images = events.Images(name)
        assert [image.step for image in images] == [1, 2] and all(image.width == 320 for image in images)
    (text,) = events.Tensors("validate/vqa/1/text_summary")[1].tensor_proto.string_val
    said = json.loads(lines[1])["prediction"].split("\n")[0]
    assert text.decode().startswith("question: What is 1?") and f"said: {said}" in text.decode()


def test_wandb_gets_pictures_with_their_text_as_caption(monkeypatch):
    logged = []
    stand_in = SimpleNamespace(Image=lambda pixels, caption: (pixels.shape, caption))
    monkeypatch.setitem(__import__("sys").modules, "wandb", stand_in)
    sink = object.__new__(sinks.WandB)
    sink.run = SimpleNamespace(starting_step=0, log=lambda values, step: logged.append((step, values)))
    shown = exhibit("vqa/0", Question(0, "a", [picture(40, 30), "Who?"], ["me"]), {"prediction": "you"})
    sink.show(7, [shown])
    ((step, values),) = logged
    (height, width, _), caption = values["vqa/0"]
    assert (
        step == 7
        and (height > 40, width) == (True, 320)
        and caption == "question: Who?\nsaid: you\nright: me"
    )


def test_a_picture_shows_its_images_beside_each_other_above_the_words():
    content = [picture(20, 400, 1), picture(50, 200, 2), "Which?"]
    line = {"logprobs": [-3.0, -1.0]}
    shown = exhibit("x", Question(0, "a", content, ["left"], ["left", "right"]), line)
    assert shown.text == "question: Which?\nsaid: right\nright: left"
    assert shown.pixels.shape[1] == 320 + 200  # the first is shrunk
    assert (shown.pixels[20:50, :320] == 255).all() and (shown.pixels[50:, :] < 128).any()
    nothing_said = exhibit("x", Question(0, "a", ["?"], []), {"prediction": ""})
    assert nothing_said.text == "question: ?\nsaid: "


def job_with(tmp_path, *tasks: str) -> VLMJobConfig:
    job = VLMJobConfig()
    job.data.cache_folder = str(tmp_path / "cache")
    job.validation.enable, job.validation.tasks = True, list(tasks)
    return job


@pytest.mark.parametrize(
    ("record", "task", "told"),
    [
        ({"image": "cut.jpg"}, "vqa", "asked.jsonl, record 5: image: the image ends before its last row"),
        ({"image": "gone.jpg"}, "vqa", "asked.jsonl, record 5: .*gone.jpg"),
        ({"answers": []}, "vqa", "asked.jsonl, record 5: it has no answer"),
        ({"choices": ["x"]}, "multiple_choice", "record 5: a choice needs two choices or more"),
        ({"answers": ["z"]}, "mmmu", "record 5: its answer 'z' is none of its 3 choices"),
        ({"question": "long " * 900}, "anls", r"record 5: the prompt has \d+ tokens"),
    ],
)
def test_a_record_that_could_not_be_asked_later_is_told_at_the_start(tmp_path, record, task, told):
    path = write(tmp_path, "jsonl")
    (tmp_path / "cut.jpg").write_bytes(jpeg(90, 90)[:-400])
    good = {"image": "0.png", "question": "?", "answers": ["a"], "choices": ["a", "b", "c"]}
    with open(path, "a") as file:
        file.write(json.dumps(good | record) + "\n")
    job = job_with(tmp_path, f"{task}={path}")
    with pytest.raises(UserError, match=told):
        TrainingTasks(job, TOKENIZER, 0, 1)
    job.validation.task_records = 5  # it is not among them
    TrainingTasks(job, TOKENIZER, 0, 1)
    job.validation.tasks = []
    assert open_tasks(job, TOKENIZER, 0, 1) is None


def test_a_rank_holds_its_own_records_and_the_first_rank_all(tmp_path):
    path = write(tmp_path, "jsonl")
    held = [TrainingTasks(job_with(tmp_path, f"anls={path}"), TOKENIZER, rank, 3) for rank in range(3)]
    records = [sorted(each.tasks["anls"].records.held) for each in held]
    assert records == [[0, 1, 2, 3, 4], [1, 4], [2]]
    question = held[1].tasks["anls"].records.read(4)
    assert question.id == "q4" and isinstance(question.content[0], Picture)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--validation.tasks", "vqa"], "validation.tasks = vqa: must be NAME=FILE"),
        (["--validation.tasks", "vqaa=x"], "validation.tasks = vqaa=x: no such task; .*vqa"),
        (["--validation.tasks", "vqa=nowhere.jsonl"], r"validation.tasks\[0\] = nowhere.jsonl: no such file"),
        (
            ["--validation.tasks", "vqa=README.md", "--validation.no_enable", "--validation.no_controls"],
            "validation.tasks needs validation.enable",
        ),
        (["--validation.task_freq", "0"], "validation.task_freq = 0: must be >= 1"),
        (["--validation.task_records", "0"], "validation.task_records = 0: must be -1 or >= 1"),
    ],
)
def test_tasks_that_cannot_run_are_refused_before_torch_is_imported(tmp_path, options, told):
    with pytest.raises(ConfigError, match=told):
        checked_job(
            ["--job.config_file", "vlm_debug", *HELD_OUT, "--job.dump_folder", str(tmp_path), *options], 1
        )


def test_tasks_with_a_pipeline_are_refused(tmp_path):
    options = [f"vqa={write(tmp_path, 'jsonl')}", "--parallelism.pipeline_parallel_degree", "2"]
    command = ["--job.config_file", "vlm_debug", *HELD_OUT, "--job.dump_folder", str(tmp_path)]
    with pytest.raises(
        ConfigError, match="validation.tasks: with .*pipeline_parallel_degree = 2 no rank can"
    ):
        checked_job([*command, "--validation.tasks", *options], 2)


def test_a_record_that_is_wrong_ends_the_run_in_one_line_before_the_model_is_built(tmp_path, capsys):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "?", "answers": ["z"], "choices": ["x", "y"]}) + "\n")
    assert run(tmp_path / "out", "--validation.tasks", f"multiple_choice={path}") == 2
    told = capsys.readouterr()
    (error,) = (line for line in told.err.splitlines() if line.startswith("error: "))
    assert re.search("asked.jsonl, record 0: its answer 'z' is none of its 2 choices", error)
    assert "parameters:" not in told.out + told.err


@pytest.fixture
def one_process(tmp_path):
    open_process_group(Comm(), tmp_path)
    yield
    close_process_group()


def test_a_model_is_given_back_as_it_was_and_the_cache_is_freed(monkeypatch, one_process):
    monkeypatch.setattr(layout, "free_gathered", lambda model: None)
    model = vlm().train()
    apply_compile(model.decoder.layers)
    before = {name: (module, module._compiled_call_impl) for name, module in model.named_modules()}
    degrees = SimpleNamespace(tp=1)
    mesh = SimpleNamespace(degrees=degrees, device=torch.device("cpu"))
    job = VLMJobConfig()
    gc.disable()  # as between the steps of a run: what is in a circle would stay
    try:
        with pytest.raises(KeyError), layout.lent(model, mesh, job, 2, 30):
            assert not model.training and all(
                b._compiled_call_impl is None for b in model.decoder.layers.values()
            )
            buffers = [weakref.ref(b.attention.inner.keys) for b in model.decoder.layers.values()]
            assert all(buffer() is not None for buffer in buffers)
            raise KeyError
        assert not any(buffer() is not None for buffer in buffers)
    finally:
        gc.enable()
    after = {name: (module, module._compiled_call_impl) for name, module in model.named_modules()}
    assert after == before and all(module.training for module in model.modules())


def test_a_cache_for_which_there_is_no_memory_is_one_error(one_process):
    mesh = SimpleNamespace(degrees=SimpleNamespace(tp=1), device=torch.device("cpu"))
    with pytest.raises(UserError, match="no memory for 2 answers at one time of 1,000,000,000,000 tokens"):
        layout.attach_cache(vlm(), mesh, VLMJobConfig(), 2, 10**12)


def test_questions_are_turns_where_the_run_trains_conversations(tmp_path):
    job = job_with(tmp_path, f"vqa={write(tmp_path, 'jsonl')}")
    asked = {}
    for format in ("cc12m", "llava", "messages", "finevision", "the_cauldron"):
        job.data.sources = [Source(format="text"), Source(format=format, chat_template="chatml")]
        asking = TrainingTasks(job, TOKENIZER, 0, 1).tasks["vqa"]
        asked[format] = TOKENIZER.decode(asking.prompts(0)[0].ids)
    assert asked["cc12m"].endswith("What is 0?")
    words = "What is 0?\nAnswer the question using a single word or phrase."
    assert all(words in text for format, text in asked.items() if format != "cc12m")


def test_answers_of_a_run_that_begins_anew_or_goes_back_are_set_aside(tmp_path):
    for name in ("checkpoint/step-2", "checkpoint/step-4", "tasks/step-2", "tasks/step-3", "tasks/step-5"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    go_back(tmp_path, (tmp_path / "checkpoint", tmp_path / "tasks"), 2)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["step-2"]
    kept = sorted(path.name for path in (tmp_path / "previous" / "1" / "tasks").iterdir())
    assert kept == ["step-3", "step-5"] and (tmp_path / "previous/1/checkpoint/step-4/file").exists()
    job = VLMJobConfig()
    job.job.dump_folder = str(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    assert begin(job) and not (tmp_path / "tasks").exists()
    assert (tmp_path / "previous" / "2" / "tasks" / "step-2" / "file").exists()


def test_tasks_of_the_last_step_that_were_cut_off_are_left_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(dump_folder, "read_record", lambda own: {"model_only": False})
    job, own, answers = VLMJobConfig(), tmp_path / "checkpoint" / "step-4", tmp_path / "tasks" / "step-4"
    job.job.dump_folder, job.validation.enable = str(tmp_path), False
    assert not dump_folder.lacks_its_last_figures(job, own, 4)
    job.validation.tasks = ["vqa=asked.jsonl"]
    answers.mkdir(parents=True)
    (answers / "vqa.jsonl").touch()
    assert dump_folder.lacks_its_last_figures(job, own, 4)
    (answers / "summary.json").touch()
    assert not dump_folder.lacks_its_last_figures(job, own, 4)


def test_the_time_of_tasks_is_no_training(monkeypatch):
    now, left_out = [0.0], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    trainer = SimpleNamespace(
        job=JobConfig(),
        run=SimpleNamespace(meter=SimpleNamespace(leave_out=left_out.append)),
        evaluator=SimpleNamespace(run_tasks=lambda: now.__setitem__(0, now[0] + 7.0)),
        save=lambda: None,
    )
    trainer.job.validation.task_freq = 20
    for step in (19, 20):
        training.Trainer.pause(trainer, step)
    assert left_out == [0.0, 7.0]
