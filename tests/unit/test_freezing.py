"""Which parameters training.freeze takes out of training."""

import pytest

from tests.reference.models import LLAMA, QWEN2, small_vlm
from torchtitan.components.freezing import choose_trained, rows_of
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import Training


def frozen(*patterns: str, tokens: tuple[str, ...] = (), **model) -> set[str]:
    vlm = small_vlm(**model)
    choose_trained(vlm, Training(freeze=list(patterns), trainable_tokens=list(tokens)))
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


@pytest.mark.parametrize("decoder", [LLAMA, QWEN2], ids=["two tables", "one"])
def test_tables_of_trainable_tokens_have_gradients_though_they_are_frozen(decoder):
    without = frozen("decoder", decoder=decoder)
    tables = {name for name in without if "embeddings" in name or "output" in name}
    assert frozen("decoder", tokens=("new",), decoder=decoder) == without - tables
    assert frozen("coder", "projector", tokens=("new",), decoder=decoder), "rows alone are enough to train"


def test_tokens_whose_table_trains_are_an_error():
    with pytest.raises(ConfigError, match="trainable_tokens = new: all rows of decoder.output.weight train"):
        frozen("encoder", "tok_embeddings", tokens=("new",))


def test_rows_are_those_of_the_tokens_and_new_ones_those_that_the_file_lacks():
    tokenizer = load_tokenizer("assets/tokenizer")
    eos = tokenizer.eos_id
    spelling = tokenizer.spellings[eos]
    assert rows_of([spelling, spelling], tokenizer) == (eos,)
    tokenizer.new_ids = {9, 3}
    assert rows_of(["new", spelling], tokenizer) == tuple(sorted((3, 9, eos)))
    with pytest.raises(
        ConfigError, match=r"trainable_tokens = <\|im_ent\|>: no special .*did you mean <\|im_end"
    ):
        rows_of(["<|im_ent|>"], tokenizer)
    tokenizer.new_ids = set()
    with pytest.raises(ConfigError, match="lacks no token"):
        rows_of(["new"], tokenizer)
