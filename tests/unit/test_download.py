"""Tokenizers and weights by name, from a stand-in for the hub; and the command that a missing tokenizer
names.
"""

import errno
import fnmatch
from pathlib import Path

import huggingface_hub as hub
import pytest
from huggingface_hub import errors

from experiments.__main__ import checked_job
from experiments.commands import main
from torchtitan.config.errors import ConfigError
from torchtitan.tools.hub import command_for, download

REPOSITORY_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "original/tokenizer.model", "original/consolidated.00.pth"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("config.json", "consolidated.safetensors", "README.md"),
]


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """How the hub was asked. It gives REPOSITORY_FILES, as the patterns choose."""
    calls = []

    def snapshot_download(repo, *, local_dir, allow_patterns, ignore_patterns, **options):
        calls.append({"repo": repo, **options})
        for name in REPOSITORY_FILES:
            allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(local_dir) / name).write_text("content")
        return str(local_dir)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "original/tokenizer.model"}
WEIGHTS = {name for name in REPOSITORY_FILES if name.startswith("model")} | {"config.json"}


@pytest.mark.parametrize(
    ("what", "files"), [("tokenizer", TOKENIZER), ("weights", WEIGHTS), ("all", TOKENIZER | WEIGHTS)]
)
def test_each_part_is_its_files_and_no_others(asked, tmp_path, what, files):
    found = download("owner/model", what, tmp_path / "new", "secret", "v2")
    assert names(tmp_path / "new") == files == {str(path.relative_to(tmp_path / "new")) for path in found}
    assert asked == [{"repo": "owner/model", "revision": "v2", "token": "secret"}]


def test_the_command_says_what_came_and_what_to_do_with_it(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["download", "--repo", "meta-llama/Llama-3.2-1B"]) == 0
    told = capsys.readouterr().out
    assert "assets/Llama-3.2-1B/tokenizer.json" in told
    assert told.endswith("use it: --model.tokenizer_path assets/Llama-3.2-1B\n")
    assert asked[0]["token"] is None, "that of the account is the library's to find"


def http_error(kind: type) -> Exception:
    error = kind.__new__(kind)
    OSError.__init__(error, "403 Client Error.\n\nCannot access")
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            http_error(errors.GatedRepoError),
            "is gated: accept its terms at https://huggingface.co/owner/model",
        ),
        (http_error(errors.RepositoryNotFoundError), "owner/model is not on the hub, or private"),
        (http_error(errors.RevisionNotFoundError), "has no revision main"),
        (http_error(errors.HfHubHTTPError), "the hub answers: "),
        (errors.HFValidationError("Repo id must ..."), "--repo owner/model: expected OWNER/NAME"),
        (
            errors.LocalEntryNotFoundError("no\nnetwork"),
            "cannot be reached (LocalEntryNotFoundError: no network)",
        ),
        (ConnectionError("offline mode"), "cannot be reached (ConnectionError: offline mode)"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; "),
    ],
)
def test_what_the_hub_raises_is_one_line_and_exit_code_2(error, told, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    assert main(["download", "--repo", "owner/model", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and told in line and line.count("\n") == 1


def test_a_repository_without_what_was_asked_for_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "snapshot_download", lambda *arguments, **options: str(tmp_path))
    assert main(["download", "--repo", "owner/model", "--out", str(tmp_path)]) == 2
    assert "owner/model has no tokenizer.json or tokenizer.model" in capsys.readouterr().err
    assert main(["download", "--repo", "owner/model", "--out", str(tmp_path), "--what", "weights"]) == 2
    assert "owner/model has no .safetensors" in capsys.readouterr().err


def test_a_missing_library_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert main(["download", "--repo", "owner/model", "--out", str(tmp_path)]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("assets/Llama-3.2-1B", "--repo meta-llama/Llama-3.2-1B --out assets/Llama-3.2-1B"),
        ("assets/Qwen3-0.6B/tokenizer.json", "--repo Qwen/Qwen3-0.6B --out assets/Qwen3-0.6B"),
        ("mine", "--repo OWNER/NAME --out mine"),
    ],
)
def test_a_missing_tokenizer_names_the_command_that_fetches_it(path, told):
    assert command_for(Path(path)) == f"python -m experiments.commands download {told}"


def test_a_job_without_its_tokenizer_is_told_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--training.dataset", "cc12m", "--training.dataset_path", "embedded:captions/train"]
    with pytest.raises(ConfigError) as caught:
        checked_job([*data, "--model.tokenizer_path", "assets/Llama-3.2-1B"], 1)
    assert str(caught.value).startswith("model.tokenizer_path = assets/Llama-3.2-1B: no such file or folder")
    assert str(caught.value).endswith("download --repo meta-llama/Llama-3.2-1B --out assets/Llama-3.2-1B`")
