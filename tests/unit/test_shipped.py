"""Which file a name means: one that is here, else one that comes with the package."""

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.config.parse import read_toml
from torchtitan.config.shipped import SHIPPED, shipped, shipped_job, shipped_jobs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shipped_file_is_found_from_every_folder():
    assert shipped("assets/tokenizer") == SHIPPED / "assets/tokenizer"
    assert shipped_job("train_configs/vlm_debug.toml") == SHIPPED / "train_configs/vlm_debug.toml"
    assert shipped_job("vlm_debug") == SHIPPED / "train_configs/vlm_debug.toml"


def test_what_is_here_comes_first(elsewhere):
    (elsewhere / "assets/tokenizer").mkdir(parents=True)
    (elsewhere / "vlm_debug").touch()
    assert (elsewhere / shipped("assets/tokenizer")).samefile(elsewhere / "assets/tokenizer")
    assert (elsewhere / shipped_job("vlm_debug")).samefile(elsewhere / "vlm_debug")


def test_a_folder_named_as_a_job_is_no_job(elsewhere):
    (elsewhere / "vlm_debug").mkdir()
    assert shipped_job("vlm_debug") == SHIPPED / "train_configs/vlm_debug.toml"


def test_a_job_that_is_nowhere_names_those_of_the_package():
    with pytest.raises(
        ConfigError,
        match="job.config_file = vlm_debag: No such file.*jobs of the package: .*, vlm, vlm_debug",
    ):
        read_toml("vlm_debag")
    assert "vlm_debug" in shipped_jobs()
