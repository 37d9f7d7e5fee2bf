"""docs/adding_a_tower.md adds a tower by one file and one line, which computes what transformers does."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import experiments.vlm.model.towers as towers
from experiments.commands import main
from experiments.vlm.model.flavors import encoders
from tests.reference.batches import draw_picture
from tests.reference.hf_folders import WIDTHS, decoder_model, save, state_of
from tests.reference.models import QWEN3
from tests.unit.test_hf_import import job_of, load
from tests.unit.test_towers import normalised_image, pack, taken_apart

PAGE = Path(__file__).parents[2] / "docs/adding_a_tower.md"


@pytest.fixture
def added(monkeypatch):
    """The page's file and line."""
    file, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = types.ModuleType("ijepa")
    monkeypatch.setitem(sys.modules, "ijepa", module)
    exec(compile(file, "ijepa.py", "exec"), module.__dict__)
    (kind, tower), *others = eval(f"{{{line}}}", {"ijepa": module}).items()
    assert not others
    monkeypatch.setitem(towers.TOWERS, kind, tower)


@torch.no_grad()
def test_a_tower_of_one_file_and_one_line_is_read_run_and_written(added, tmp_path):
    from transformers import IJepaConfig, IJepaModel

    assert encoders()["ijepa-H"].dim == 1280
    theirs = IJepaModel(IJepaConfig(**WIDTHS, image_size=32), add_pooling_layer=False)
    folders = {"encoder": save(theirs, tmp_path / "theirs"), "decoder": tmp_path / "decoder"}
    save(decoder_model(QWEN3), folders["decoder"])
    ours = load(job_of(encoder_path=folders["encoder"], decoder_path=folders["decoder"])).encoder
    picture = draw_picture(8, 8, 4, 0)
    found = taken_apart(ours(*pack([[picture]], ours.config)), [[picture]], 0)[0]
    expected = theirs.eval()(normalised_image(picture, ours.config)).last_hidden_state[0]
    assert (found - expected).abs().max() < 1e-4
    named = [word for part, folder in folders.items() for word in (f"--{part}", str(folder))]
    assert main(["from_hf", *named, "--out", str(tmp_path / "checkpoint")]) == 0
    back = ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "back")]
    assert main(["to_hf", *back, "--part", "encoder"]) == 0
    before, after = state_of(folders["encoder"]), state_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    reopened = IJepaModel.from_pretrained(tmp_path / "back", add_pooling_layer=False)
    assert reopened.config.qkv_bias and reopened.config.image_size == 32
