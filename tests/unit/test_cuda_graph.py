"""A step that is replayed trains exactly as one that Python drives. tests/gpu shows the same of real CUDA graphs."""

import pytest
import torch

from tests.reference.tape import VARIANTS, TapeRecorder, assert_same, train_with

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has real graphs")


@pytest.mark.parametrize("name", VARIANTS)
def test_replayed_steps_equal_driven_ones(name, tmp_path, monkeypatch):
    driven = train_with(None, tmp_path / "driven", VARIANTS[name])
    recorder = TapeRecorder(monkeypatch)
    assert_same(train_with(recorder, tmp_path / "replayed", VARIANTS[name]), driven, 1e-6)
    assert recorder.replays == 6
