"""Which parameters training.freeze takes out of training."""

import pytest

from tests.reference.models import QWEN2, small_vlm
from torchtitan.components.freezing import freeze
from torchtitan.config.errors import ConfigError


def frozen(*patterns: str, **model) -> set[str]:
    vlm = small_vlm(**model)
    freeze(vlm, patterns)
    return {name for name, parameter in vlm.named_parameters() if not parameter.requires_grad}


def test_a_part_is_frozen_whole_and_alone():
    names = frozen("encoder")
    assert names == {name for name, _ in small_vlm().named_parameters() if name.startswith("encoder.")}


def test_a_pattern_is_looked_for_anywhere_in_a_name():
    every = [name for name, _ in small_vlm().named_parameters()]
    assert frozen(r"decoder\.layers\.0\.", "bias$") == {
        name for name in every if name.startswith("decoder.layers.0.") or name.endswith("bias")
    }


def test_a_tied_table_is_found_by_both_its_names():
    assert frozen(r"decoder\.output", decoder=QWEN2) == {"decoder.tok_embeddings.weight"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["encodr"], "training.freeze = encodr: matches no parameter .*did you mean encoder?"),
        (["encoder", r"layers\.7\."], r"training.freeze = layers\\.7\\.: matches no parameter"),
        (["coder", "projector"], "training.freeze = coder projector: matches every parameter"),
    ],
)
def test_a_pattern_that_changes_nothing_or_leaves_nothing_is_an_error(patterns, message):
    with pytest.raises(ConfigError, match=message):
        frozen(*patterns)
