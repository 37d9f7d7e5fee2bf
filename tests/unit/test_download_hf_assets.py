"""Weights and tokenizers by name, from a stand-in for the hub; and the command that a missing one names."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub as library
import pytest
from huggingface_hub import constants, errors

from experiments.__main__ import checked_job
from experiments.commands import main
from tests.reference import hub
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import ConfigError, UserError
from torchtitan.tools.hub import command_for, download, repository

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "assets/tokenizer"
TOKENIZER = {"tokenizer.model", "special_tokens.json", "tokenizer_config.json", "chat_template.jinja"}
WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
WEIGHTS |= {"model.safetensors.index.json", "config.json", "generation_config.json"}
OTHERS = {"README.md", "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth"}
FILES = {name: name.encode() * 1000 for name in TOKENIZER | WEIGHTS | OTHERS}
FILES["config.json"] = b'{"model_type": "qwen3"}'
FILES |= {name: (SHIPPED / name).read_bytes() for name in ("tokenizer.model", "special_tokens.json")}


@pytest.fixture
def served(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    weights = {name: content for name, content in FILES.items() if name in WEIGHTS}
    models = {"Qwen/Qwen3-0.6B": FILES, "owner/model": FILES, "owner/words": {"tokenizer.json": b"{}"}}
    models |= {"google/siglip2-tower": weights, "owner/empty": {"README.md": b"-"}}
    with hub.serving(models) as running:
        files = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.address + files)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        yield running


def names(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(file) for file in files if file.parts[0] != ".cache"}


def test_the_script_fetches_weights_and_tokenizer_from_the_hub(served, tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts/download_hf_assets.py"), "Qwen3-0.6B"]
    environment = {**os.environ, "HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "assets/Qwen3-0.6B"
    assert names(folder) == TOKENIZER | WEIGHTS
    assert {name: (folder / name).read_bytes() for name in names(folder)}.items() <= FILES.items()
    start = "start from its weights: --checkpoint.initial_load_in_hf --checkpoint.initial_load_decoder_path"
    use = "use its tokenizer: --model.tokenizer_path"
    assert done.stdout.endswith(f"{start} assets/Qwen3-0.6B\n{use} assets/Qwen3-0.6B\n")
    expected = load_tokenizer(str(SHIPPED)).encode("a red star")
    assert load_tokenizer(str(folder)).encode("a red star") == expected


@pytest.mark.parametrize(
    ("what", "files"), [("tokenizer", TOKENIZER), ("weights", WEIGHTS), ("all", TOKENIZER | WEIGHTS)]
)
def test_each_part_is_its_files_and_no_others(served, tmp_path, what, files):
    found = download("owner/model", what, tmp_path / "new")
    assert names(tmp_path / "new") == files == {str(path.relative_to(tmp_path / "new")) for path in found}


def test_a_tower_has_no_tokenizer_and_needs_none(served, tmp_path, capsys):
    assert main(["download", "siglip2-tower", "--out", str(tmp_path)]) == 0
    assert names(tmp_path) == WEIGHTS and "use its tokenizer" not in capsys.readouterr().out


def test_broken_off_or_stopped_it_goes_on_and_fetches_nothing_twice(served, tmp_path):
    whole = "model-00001-of-00002.safetensors"
    served.cut.add(whole)
    download("owner/model", "all", tmp_path)
    served.given.clear()
    (tmp_path / whole).unlink()
    download("owner/model", "all", tmp_path)
    assert served.given == [whole] and (tmp_path / whole).read_bytes() == FILES[whole]


def test_a_gated_model_is_told_and_comes_with_a_token(served, tmp_path, capsys):
    served.gated.add("owner/model")
    asked = ["download", "owner/model", "--out", str(tmp_path)]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert "owner/model is gated: accept its terms at https://huggingface.co/owner/model" in told
    assert main([*asked, "--token", "secret"]) == 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["owner/no"], "owner/no is not on the hub, or private"),
        (["a/b/c"], "a/b/c: expected OWNER/NAME"),
        (["mine"], "mine: whose model is it? give OWNER/NAME"),
        (["owner/empty"], "owner/empty has no .safetensors: name a repository that has the weights so\n"),
        (["owner/words"], "the weights so; `--what tokenizer` fetches its tokenizer alone"),
        (["siglip2-tower", "--what", "tokenizer"], "google/siglip2-tower has no tokenizer.json or "),
    ],
)
def test_what_the_hub_does_not_have_is_one_line_and_exit_code_2(served, tmp_path, capsys, asked, told):
    assert main(["download", *asked, "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines(keepends=True)[-1]  # the library's own progress comes before
    assert line.startswith("error: ") and told in line


def http_error(kind: type) -> Exception:
    error = kind.__new__(kind)
    OSError.__init__(error, "403 Client Error.\n\nCannot access")
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (http_error(errors.RevisionNotFoundError), "has no revision main"),
        (http_error(errors.HfHubHTTPError), "the hub answers: "),
        (errors.LocalEntryNotFoundError("no\nnetwork"), "(LocalEntryNotFoundError: no network)"),
        (ConnectionError("offline mode"), "cannot be reached (ConnectionError: offline mode)"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; "),
    ],
)
def test_what_the_hub_raises_is_one_line_and_exit_code_2(error, told, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(library, "snapshot_download", fail)
    assert main(["download", "owner/model", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and told in line and line.count("\n") == 1


def test_a_missing_library_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["download", "owner/model", "--out", str(tmp_path)]) == 2
    assert "pip install huggingface_hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("assets/Llama-3.2-1B", "meta-llama/Llama-3.2-1B --out assets/Llama-3.2-1B"),
        ("assets/Qwen3-0.6B/tokenizer.json", "Qwen/Qwen3-0.6B --out assets/Qwen3-0.6B"),
        ("x/siglip2-base-patch16-512", "google/siglip2-base-patch16-512 --out x/siglip2-base-patch16-512"),
        ("mine", "OWNER/NAME --out mine"),
    ],
)
def test_a_missing_file_names_the_command_that_fetches_it(path, told):
    assert command_for(Path(path)) == f"python scripts/download_hf_assets.py {told}"


def test_a_name_alone_is_completed_where_its_owner_is_known():
    assert repository("Mistral-7B-v0.3") == "mistralai/Mistral-7B-v0.3"
    assert repository("owner/Qwen") == "owner/Qwen"
    with pytest.raises(UserError, match="whose model is it"):
        repository("GPT-2")


def test_a_job_without_its_tokenizer_is_told_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--training.dataset", "cc12m", "--training.dataset_path", "embedded:captions/train"]
    with pytest.raises(ConfigError) as caught:
        checked_job([*data, "--model.tokenizer_path", "assets/Llama-3.2-1B"], 1)
    command = "python scripts/download_hf_assets.py meta-llama/Llama-3.2-1B --out assets/Llama-3.2-1B`"
    assert str(caught.value).startswith("model.tokenizer_path = assets/Llama-3.2-1B: no such file or folder")
    assert str(caught.value).endswith(command)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("assets/Llama-3.2-1B")
    assert str(caught.value).endswith(command)
