"""Steps replayed as a CUDA graph against steps driven by Python.

pytest tests/gpu
"""

import pytest
import torch

from tests.reference.tape import VALIDATIONS, VARIANTS, assert_same, train_with
from torchtitan.components.cuda_graph import Recorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _deterministic_here_alone():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", VARIANTS)
def test_replayed_steps_equal_driven_ones(name, compiled, tmp_path):
    # Both compiled or neither: in bfloat16 Muon makes much of a last digit.
    changes = {"model.flavor": "small-wide", "debug.deterministic": True, "compile.enable": compiled}
    changes |= VARIANTS[name]
    driven = train_with(None, tmp_path / "driven", changes, VALIDATIONS["always"])
    replayed = train_with(Recorder(), tmp_path / "replayed", changes, VALIDATIONS["always"])
    assert_same(replayed, driven, 1e-4)
