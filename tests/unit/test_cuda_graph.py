"""A step that is replayed trains exactly as one that Python drives. tests/gpu shows the same of real CUDA
graphs.
"""

import pytest
import torch

from tests.reference.tape import STEPS, VALIDATIONS, VARIANTS, TapeRecorder, assert_same, train_with

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has real graphs")


@pytest.mark.parametrize("name", VARIANTS)
def test_replayed_steps_equal_driven_ones(name, tmp_path, monkeypatch):
    driven = train_with(None, tmp_path / "driven", VARIANTS[name])
    recorder = TapeRecorder(monkeypatch)
    assert_same(train_with(recorder, tmp_path / "replayed", VARIANTS[name]), driven, 1e-6)
    assert recorder.replays == 6


@pytest.mark.parametrize("when", VALIDATIONS)
def test_validation_sees_present_weights_amid_replayed_steps(when, tmp_path, monkeypatch):
    changes = {"model.flavor": "small-qwen3-tied"} if when == "always" else {}
    alone = train_with(None, tmp_path / "alone", changes)
    driven = train_with(None, tmp_path / "driven", changes, VALIDATIONS[when])
    replayed = train_with(TapeRecorder(monkeypatch), tmp_path / "replayed", changes, VALIDATIONS[when])
    assert_same(replayed, driven, 1e-6)
    assert replayed.losses == pytest.approx(alone.losses, rel=1e-6)
    assert len(replayed.held_out) == len(set(replayed.held_out)) == len(VALIDATIONS[when]) <= STEPS
