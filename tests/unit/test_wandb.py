"""Weights & Biases: what it lacks is one line before anything is built."""

import importlib.util
import sys
import types

import pytest

from experiments.__main__ import main
from torchtitan.components.dump_folder import FILES
from torchtitan.components.sinks import WandB
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig
from torchtitan.tools.wandb_login import require_wandb


class Failed(Exception):
    pass


@pytest.fixture
def stand_in(monkeypatch) -> types.ModuleType:
    """A wandb where nobody is logged in."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    module = types.ModuleType("wandb")
    module.login = lambda *, prompt, verify: False
    module.errors = types.SimpleNamespace(Error=Failed)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="metrics.enable_wandb needs the package wandb: pip install wandb"):
        require_wandb()


def test_a_run_without_a_login_ends_before_torch_is_imported(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchtitan.train", None)  # importing it would raise
    data = ["--training.dataset", "cc12m", "--training.dataset_path", "embedded:captions/train"]
    assert main([*data, "--job.dump_folder", str(tmp_path), "--metrics.enable_wandb"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: metrics.enable_wandb: nobody is logged in") and line.count("\n") == 1
    assert "wandb login" in line and "WANDB_MODE=offline" in line


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_no_login_is_asked_for_where_nothing_is_sent(stand_in, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    require_wandb()


def test_somebody_who_is_logged_in_passes(stand_in):
    stand_in.login = lambda *, prompt, verify: True
    require_wandb()


def test_an_older_package_that_would_prompt_is_asked_for_its_key(stand_in):
    stand_in.login = lambda: pytest.fail("it prompts")
    stand_in.api = types.SimpleNamespace(api_key=None)
    with pytest.raises(ConfigError, match="nobody is logged in"):
        require_wandb()
    stand_in.api.api_key = "key"
    require_wandb()


def test_a_service_that_cannot_be_reached_is_one_line(stand_in, tmp_path):
    def fail(**options):
        raise Failed("Timed out:\n no such host")

    stand_in.init = fail
    with pytest.raises(
        ConfigError, match="metrics.enable_wandb: Timed out: no such host; WANDB_MODE=offline"
    ):
        WandB(tmp_path, JobConfig())


class Opened:
    """What wandb.init gives; `begun`: all of them, with their options and what was logged."""

    def __init__(self, begun: list["Opened"], **options):
        self.options, self.logged = options, []
        self.id = options["id"] or f"id{len(begun)}"
        logged = [step for run in begun if run.id == self.id for step, _ in run.logged]
        self.starting_step = max(logged, default=-1) + 1
        begun.append(self)

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


@pytest.fixture
def begun(stand_in, monkeypatch) -> list[Opened]:
    for name in ("WANDB_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    runs: list[Opened] = []
    stand_in.init = lambda **options: Opened(runs, **options)
    return runs


def test_a_run_has_the_name_of_its_folder_its_group_and_its_description(begun, tmp_path, monkeypatch):
    job = JobConfig()
    job.job.description, job.metrics.wandb_group = "what for", "lr"
    for name, environment, expected in (
        ("", "", "lr=1"),
        ("", "theirs", "theirs"),
        ("mine", "theirs", "mine"),
    ):
        monkeypatch.setenv("WANDB_NAME", environment)
        job.metrics.wandb_name = name
        (tmp_path / "lr=1").mkdir(exist_ok=True)
        WandB(tmp_path / "lr=1", job)
        assert begun[-1].options["name"] == expected
    assert (begun[0].options["group"], begun[0].options["notes"]) == ("lr", "what for")
    assert begun[0].options["config"]["metrics"]["wandb_group"] == "lr"


def test_a_run_that_goes_on_keeps_its_id_and_sends_no_step_twice(begun, tmp_path):
    first = WandB(tmp_path, JobConfig())
    for step in (1, 2, 3):
        first.write(step, {"loss": 1.0})
    second = WandB(tmp_path, JobConfig())  # from the checkpoint of step 1
    for step in (2, 3, 4):
        second.write(step, {"loss": 1.0})
    assert [run.id for run in begun] == ["id0", "id0"] and begun[1].options["resume"] == "allow"
    assert begun[1].logged == [(4, {"loss": 1.0})]
    assert "wandb_id" in FILES  # a fresh run in this folder is another one


def test_the_real_package_knows_no_login_here(monkeypatch, tmp_path):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="nobody is logged in"):
        require_wandb()
