"""Options from command line, TOML and defaults: which one wins, what comes back,
and what a fault is called.
"""

import ast
import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from experiments.vlm.config import Columns, Source, VLMJobConfig
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig
from torchtitan.config.parse import option_types, parse, parse_script, to_toml

CLASSES = {"vlm": VLMJobConfig}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and gives the options that name it."""

    def write(text: str, name: str = "job.toml") -> list[str]:
        (tmp_path / name).write_text(text)
        return ["--job.config_file", str(tmp_path / name)]

    return write


def fault(argv: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv, CLASSES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_command_line_beats_toml_beats_default(toml):
    file = toml("[training]\nsteps = 7\nseq_len = 512\n")
    job = parse([*file, "--training.steps", "9"], CLASSES)
    assert (job.training.steps, job.training.seq_len) == (9, 512)
    assert job.training.local_batch_size == JobConfig().training.local_batch_size


def test_the_last_config_file_wins_and_the_first_is_not_read(toml):
    first, last = toml("not toml at all", "first.toml"), toml("[training]\nsteps = 2\n", "last.toml")
    job = parse([*first, *last], CLASSES)
    assert (job.training.steps, job.job.config_file) == (2, last[1])


def test_the_last_of_a_repeated_option_wins():
    assert parse(["--training.steps", "3", "--training.steps=4"], CLASSES).training.steps == 4


def test_flags_switch_on_and_off(toml):
    file = toml("[metrics]\nenable_tensorboard = true\n")
    job = parse([*file, "--compile.enable", "--metrics.no_enable_tensorboard"], CLASSES)
    assert job.compile.enable and not job.metrics.enable_tensorboard


def test_values_reach_subclassed_sections(toml):
    file = toml('[validation]\nfreq = 5\n[[validation.sources]]\nformat = "cc12m"\npath = "x"\n')
    job = parse([*file, "--validation.enable", "--data.patch_rows", "3"], CLASSES)
    assert job.validation.enable and job.validation.freq == 5
    assert job.validation.sources == [Source(format="cc12m", path="x")]
    assert job.data.patch_rows == 3


def test_an_item_of_a_list_of_tables_can_be_changed_from_the_command_line(toml):
    file = toml('[[data.sources]]\npath = "a"\n[[data.sources]]\npath = "b"\nweight = 2\n')
    job = parse([*file, "--data.sources.1.path", "c"], CLASSES)
    assert [(s.path, s.weight) for s in job.data.sources] == [("a", 1.0), ("c", 2.0)]


def test_a_dataset_on_the_command_line_replaces_training_sources_alone(toml):
    file = toml('[[data.sources]]\npath = "a"\n[[validation.sources]]\npath = "held out"\n')
    job = parse([*file, "--training.dataset", "cc12m", "--training.dataset_path", "x.tar"], CLASSES)
    assert job.training_sources() == [Source(format="cc12m", path="x.tar")]
    assert [source.path for source in job.validation.sources] == ["held out"]


SINGLE = ["--training.dataset", "llava", "--training.dataset_path", "x.jsonl"]
READ = "weight = 2\nshuffle = false\nshuffle_buffer = 8\nrepeat = false\nchat_template = 'llama3'\n"
AS_READ = {"weight": 2.0, "shuffle": False, "shuffle_buffer": 8, "repeat": False, "chat_template": "llama3"}


def test_a_dataset_on_the_command_line_is_read_as_the_source_that_it_replaces(toml):
    file = toml(
        '[[data.sources]]\nname = "captions"\nformat = "cc12m"\npath = "a"\ncolumns = {text = "alt"}\n' + READ
    )
    job = parse([*file, *SINGLE], CLASSES)
    assert job.training_sources() == [Source(format="llava", path="x.jsonl", **AS_READ)]
    job = parse(toml(to_toml(job)), CLASSES)
    assert job.training_sources() == [Source(format="llava", path="x.jsonl", **AS_READ)], (
        "as config.toml tells it"
    )


def test_what_the_command_line_says_of_the_first_source_holds_beside_a_dataset(toml):
    file = toml(
        "[[data.sources]]\npath = 'a'\n" + READ + "[[data.sources]]\npath = 'b'\nchat_template = 'chatml'\n"
    )
    options = {"name": "mine", "chat_template": "x.jinja", "shuffle_buffer": 5}
    argv = [word for name, value in options.items() for word in (f"--data.sources.0.{name}", str(value))]
    argv += ["--data.sources.0.columns.text", "said"]
    job = parse([*file, *SINGLE, *argv, "--data.sources.0.shuffle", "--data.sources.0.no-repeat"], CLASSES)
    said = {**options, "shuffle": True, "repeat": False, "columns": Columns(text="said")}
    assert [{name: getattr(source, name) for name in said} for source in job.training_sources()] == [said]


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        (
            "chat_template = 'llama3'\n[[data.sources]]\n",
            [],
            "2 sources that differ in chat_template (llama3, chatml)",
        ),
        (
            "repeat = false\n[[data.sources]]\n",
            [],
            "with --data.sources.0.repeat or --data.sources.0.no_repeat",
        ),
        (
            "[[data.sources]]\n",
            ["--data.sources.1.chat_template", "llama3"],
            "--data.sources.1.chat_template: training.dataset leaves one",
        ),
        ("", ["--data.sources.0.path", "y"], "--data.sources.0.path: training.dataset and its path say it"),
        ("", ["--data.sources.0.format", "text"], "--data.sources.0.format: training.dataset"),
    ],
)
def test_a_dataset_beside_options_that_cannot_hold_is_refused(toml, tables, options, message):
    assert message in fault([*toml("[[data.sources]]\n" + tables), *SINGLE, *options])


def test_a_whole_number_is_a_float_in_toml(toml):
    lr = parse(toml("[optimizer]\nlr = 1\n"), CLASSES).optimizer.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_negative_numbers_lists_and_none_on_the_command_line(toml):
    file = toml("[lr_scheduler]\ndecay_ratio = 0.5\n[training]\nglobal_batch_size = 8\n")
    argv = [
        "--training.global_batch_size",
        "-1",
        "--training.freeze",
        "encoder",
        "projector",
        "--lr_scheduler.decay_ratio",
        "None",
    ]
    job = parse([*file, *argv], CLASSES)
    assert job.training.global_batch_size == -1
    assert job.training.freeze == ["encoder", "projector"]
    assert job.lr_scheduler.decay_ratio is None


def changed(value):
    """Another value of the same kind: no default survives."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value


def test_every_option_survives_the_round_trip_through_toml(toml):
    job = VLMJobConfig()
    for section in dataclasses.fields(job):
        record = getattr(job, section.name)
        for field in dataclasses.fields(record):
            setattr(record, field.name, changed(getattr(record, field.name)))
    job.job.description = 'quotes " and \\ and\nlines\t, umlauts äöü, \x7f, 🙂, # [no] = "table"'
    job.optimizer.eps, job.optimizer.lr = 1e-20, 1e22
    job.lr_scheduler.decay_ratio = 0.1
    job.training.freeze, job.parallelism.pipeline_parallel_split_points = ["encoder"], [1, 2]
    job.data.sources = [Source(name="a", path="{0..9}.tar"), Source(name="b", weight=0.25, shuffle=False)]
    job.validation.sources = [Source(name="c", columns=Columns(image="a photo", text='"said"'))]
    again = parse(toml(to_toml(job)), CLASSES)
    again.job.config_file = None
    assert again == job


def test_every_option_has_a_help_text(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"], CLASSES)
    text = capsys.readouterr().out
    assert end.value.code == 0
    example = VLMJobConfig()
    example.data.sources = [Source()]
    example.validation.sources = [Source()]
    missing = [name for name in option_types(VLMJobConfig, example) if f"--{name}" not in text]
    assert not missing


@pytest.mark.parametrize("file", ["torchtitan/config/job.py", "experiments/vlm/config.py"])
def test_every_option_carries_a_comment_which_is_its_help_text(file):
    source = (REPOSITORY / file).read_text()
    lines = source.splitlines()
    for section in [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and "JobConfig" not in node.name
    ]:
        for field in [node for node in section.body if isinstance(node, ast.AnnAssign)]:
            above, beside = lines[field.lineno - 2 : field.lineno]
            explained = "  # " in beside or above.lstrip().startswith("# ")
            assert explained, f"{section.name}.{ast.unparse(field.target)} has no help text"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--traning.steps", "5"], "--training.steps"),
        (["--training.lr", "5"], "--optimizer.lr"),
        (["--training.steps", "many"], "training.steps = many: expected a whole number"),
        (
            ["--training.steps", "5", "--training.steps", "many"],
            "training.steps = many: expected a whole number",
        ),
        (["--training.steps", "1.5"], "training.steps = 1.5: expected a whole number"),
        (["--training.steps"], "training.steps: expected a whole number, got 0 values"),
        (["--training.steps", "5", "6"], "training.steps: expected a whole number, got 2 values"),
        (["--optimizer.name", "SGD"], "optimizer.name = SGD: expected one of AdamW, Muon"),
        (["--compile.enable", "True"], "compile.enable = True: takes no value"),
        (["--lr_scheduler.decay_ratio", "half"], "lr_scheduler.decay_ratio = half: expected a number"),
        (["--training.no_steps"], "--training.no_steps: no such option"),
        (["stray"], "stray: no such option"),
        (["--data.sources.0.path", "x"], "--data.sources.0.path x: no such option"),
        (["--model.name", "vln"], "model.name = 'vln' is not an experiment; did you mean vlm?"),
        (["--job.config_file", "nowhere.toml"], "job.config_file = nowhere.toml: No such file"),
    ],
)
def test_a_fault_on_the_command_line_is_named(argv, told):
    assert told in fault(argv)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[trainin]\nsteps = 1", "trainin is not a known option; did you mean training?"),
        ("[training]\nstep = 1", "training.step is not a known option; did you mean training.steps?"),
        ('[training]\nsteps = "1"', "training.steps = '1': expected a whole number"),
        ("[training]\nsteps = 1.5", "training.steps = 1.5: expected a whole number"),
        ("[training]\nsteps = true", "training.steps = True: expected a whole number"),
        ("[optimizer]\nlr = true", "optimizer.lr = True: expected a number"),
        ('[optimizer]\nname = "SGD"', "optimizer.name = 'SGD': expected one of AdamW, Muon"),
        ("[compile]\nenable = 1", "compile.enable = 1: expected true or false"),
        ('[training]\nfreeze = "encoder"', "training.freeze = 'encoder': expected a list"),
        ("[training]\nfreeze = [1]", "training.freeze[0] = 1: expected a text"),
        ("training = 3", "training = 3: expected a table"),
        (
            '[[data.sources]]\npth = "x"',
            "data.sources[0].pth is not a known option; did you mean data.sources[0].path?",
        ),
        ("[data]\nsources = [3]", "data.sources[0] = 3: expected a table"),
        ("[model]\nname = 3", "model.name = 3: expected a text"),
        ('[job]\nconfig_file = "x"', "job.config_file belongs on the command line"),
        ("[training\n", "at line 1"),
    ],
)
def test_a_fault_in_a_file_names_file_key_and_value(toml, text, told):
    message = fault(toml(text))
    assert told in message and "job.toml" in message


def test_a_file_as_windows_writes_it_is_read(tmp_path):
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 7\r\n")
    assert parse(["--job.config_file", str(tmp_path / "job.toml")], CLASSES).training.steps == 7


def test_a_file_that_is_not_utf_8_is_told(tmp_path):
    (tmp_path / "job.toml").write_bytes(b'[job]\ndescription = "gr\xf6\xdfe"\n')
    told = fault(["--job.config_file", str(tmp_path / "job.toml")])
    assert told.endswith("job.toml: byte 23 is not UTF-8: save the file as UTF-8")


@dataclass
class Report:
    """A script's options."""

    file: tyro.conf.Positional[str] = "none"  # what to read
    out: str = "report.html"  # where to write
    open: bool = False  # show it


def test_a_script_takes_its_own_options_and_the_trainers():
    argv = ["batch.bin", "--training.steps", "5", "--out", "x.html", "--open", "--compile.enable"]
    own, job = parse_script(argv, Report, CLASSES)
    assert own == Report("batch.bin", "x.html", True)
    assert job.training.steps == 5 and job.compile.enable


def test_a_scripts_unknown_option_is_told_as_the_jobs():
    with pytest.raises(ConfigError, match="--outt x: no such option"):
        parse_script(["--outt", "x"], Report, CLASSES)


def test_configuration_imports_no_torch():
    code = "import sys, experiments.__main__ as m; m.parse(['--training.steps', '3'], m.CONFIG_CLASSES)\n"
    code += "print('torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert told.stdout.strip() == "False", told.stderr
