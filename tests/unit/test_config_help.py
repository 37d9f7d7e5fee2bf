"""What `--help` tells somebody who has not read the code."""

import re

import pytest

from experiments.__main__ import CONFIG_CLASSES, checked_job
from experiments.vlm.config import Source, VLMJobConfig
from experiments.vlm.data.formats import FORMATS
from experiments.vlm.model.flavors import FLAVORS
from tests.unit.test_config_parse import Report
from torchtitan.config.errors import ConfigError
from torchtitan.config.parse import option_types, parse_script

DEBUG = ["--job.config_file", "train_configs/vlm_debug.toml"]


@pytest.fixture
def shown(capsys, monkeypatch):
    """What a command line prints before it ends."""

    def show(*argv: str) -> str:
        monkeypatch.setenv("COLUMNS", "110")
        with pytest.raises(SystemExit) as end:
            checked_job(argv, 1)
        assert end.value.code == 0
        return capsys.readouterr().out

    return show


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^[│ ]+--([a-z][\w.]+)", text, re.M)) - {"help"}


def test_every_option_is_told_in_words(shown):
    text = shown("--help")
    example = VLMJobConfig()
    example.data.sources, example.validation.sources = [Source()], [Source()]
    assert options_in(text) >= {name for name in option_types(VLMJobConfig, example) if ".groups" not in name}
    value = r"(, --[\w.]+| STR| INT| FLOAT| \{[^}]*\}(\|[A-Z]+)?| \[[^(]*\])?"
    without = re.findall(rf"--([\w.]+){value} \(default:", " ".join(text.replace("│", " ").split()))
    assert without == []


def test_a_section_is_shown_alone_with_the_tables_in_it(shown):
    for asked in ("data", "data.sources", "data.patch_rows"):
        sections = {name.partition(".")[0] for name in options_in(shown("--help", asked))}
        assert sections == {"data"}
    assert "data.sources.0.path" in options_in(shown("-h", "data"))
    both = options_in(shown(*DEBUG, "--help", "lora", "debug", "--training.steps", "3"))
    assert {name.partition(".")[0] for name in both} == {"lora", "debug"}


def test_defaults_are_those_of_the_file(shown):
    text = shown(*DEBUG, "--help", "training")
    assert "Defaults are those of train_configs/vlm_debug.toml." in text
    assert "optimizer steps (default: 180)" in text


def test_formats_flavors_sections_and_variables_are_listed(shown):
    text = " ".join(shown("--help").split())
    usage = text.partition("Train the debug model")[0]
    assert usage.startswith("usage: ") and "./run_train.sh [-h]" in usage
    assert all(f"[{name}=" in usage for name in ("CONFIG_FILE", "NGPU", "LOG_RANK", "DRY_RUN"))
    assert all(f" {name} " in text for name in ("NNODES,", "NODE_RANK,", "MASTER_ADDR,", "MASTER_PORT"))
    formats = re.search(r"Formats of sources: ([^.]*)\.", text)[1]
    assert formats.split(", ") == list(FORMATS)
    assert formats in " ".join(shown("--help", "validation").split())
    model = " ".join(shown("--help", "model").split())
    encoders, decoders = re.search(r"of the encoders (.*?) and the decoders (.*?)\. ", model).groups()
    pairs = {f"{one}-{other}" for one in encoders.split(", ") for other in decoders.split(", ")}
    whole = re.search(r"Flavors: debugmodel, (.*?), or ENCODER-DECODER", model)[1].split(", ")
    of_tests = {name for name in FLAVORS if name.startswith(("small-", "estimated"))}
    assert {"debugmodel", *whole, *pairs} == set(FLAVORS) - of_tests


def test_a_section_that_there_is_not_is_told():
    with pytest.raises(ConfigError, match="--help dta: no such section; did you mean data?"):
        checked_job(["--help", "dta"], 1)


def test_a_section_is_shown_by_a_script_too(capsys):
    with pytest.raises(SystemExit):
        parse_script(["--help", "compile"], Report, CONFIG_CLASSES)
    text = capsys.readouterr().out
    assert "--compile.cuda_graphs" in text and "usage: torchtitan-vlm train [-h]" in text
    with pytest.raises(SystemExit):
        parse_script(["--help"], Report, CONFIG_CLASSES)
    own = capsys.readouterr().out
    assert "--open" in own and "torchtitan-vlm train --help" in own
