"""From document to token ids: what is a target, and how a long document is cut."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.vlm.data.document import Document, Image, Special, Text
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.sample import Sample, plan_samples
from tests.tiny_data import Characters

TOKENIZER = Characters()
BOS, EOS, IMAGE, BEGIN, END = 256, 257, 259, 260, 261
SLOT = Budget(seq_len=64, patch_rows=1, patches_per_row=64)


@dataclass(frozen=True)
class Sizes:
    """An image of (height, width) pixels has as many patches."""

    merge_size: int = 2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width


def plan(parts, budget=SLOT, long="split") -> list[Sample]:
    return plan_samples(Document("key", parts), TOKENIZER, Sizes(), budget, long)


def spelled(sample: Sample) -> str:
    names = {BOS: "<", EOS: ">", IMAGE: "*", BEGIN: "[", END: "]", 262: "@"}
    return "".join(names.get(token, chr(token)) for token in sample.tokens.tolist())


def targets(sample: Sample) -> str:
    """The tokens that are predicted, the others as dots."""
    return "".join(letter if target else "." for letter, target in zip(spelled(sample), sample.targets, strict=True))


def test_text_and_the_end_are_targets_and_images_are_not():
    (sample,) = plan([Text("ab"), Image(0, 2, 4), Text("c")])
    assert spelled(sample) == "<ab[**]c>"
    assert targets(sample) == ".ab....c>"
    assert [(image.start, image.h, image.w) for image in sample.images] == [(3, 2, 4)]


def test_context_is_no_target():
    (sample,) = plan([Special("<|turn|>"), Text("user ", loss=False), Text("answer"), Special("<|turn|>", loss=True)])
    assert spelled(sample) == "<@user answer@>"
    assert targets(sample) == "." * 7 + "answer@>"


def test_an_unknown_marker_is_spelled_out():
    (sample,) = plan([Special("<|no|>"), Text("x")])
    assert spelled(sample) == "<<|no|>x>" and targets(sample) == "." * 7 + "x>"


def test_the_placeholder_in_a_text_is_text():
    (sample,) = plan([Text("<|image|>")])
    assert IMAGE not in sample.tokens


def test_a_long_document_is_cut_where_parts_meet():
    pieces = plan([Text("a" * 30), Image(0, 4, 8), Text("b" * 25), Image(1, 4, 8), Text("c" * 20)])
    image = "[" + "*" * 8 + "]"
    assert [spelled(piece) for piece in pieces] == ["<" + "a" * 30, image + "b" * 25, image + "c" * 20 + ">"]
    assert [[image.number for image in piece.images] for piece in pieces] == [[], [0], [1]]


@pytest.mark.parametrize("patches, lengths", [(16, [64, 64, 24]), (64, [32, 32, 32, 32, 24]), (160, [16] * 9 + [8]), (256, [16] * 9 + [8])])
def test_a_long_text_leaves_room_for_as_many_images_as_slots_are_made_for(patches, lengths):
    pieces = plan([Text("a" * 150)], Budget(64, 1, patches))
    assert [len(piece.tokens) for piece in pieces] == lengths
    assert targets(pieces[0])[0] == "." and targets(pieces[-1])[-1] == ">"


def test_pieces_with_images_leave_room_for_others():
    pieces = plan([Text("a" * 20), Image(0, 4, 4), Text("b" * 20), Image(1, 4, 4), Text("c" * 20), Image(2, 4, 4), Text("d" * 20)])
    assert [len(piece.tokens) for piece in pieces] == [27, 26, 26, 21]


def test_truncation_keeps_the_longest_beginning():
    (sample,) = plan([Text("a" * 40), Image(0, 4, 4), Text("b" * 40)], long="truncate")
    assert spelled(sample) == "<" + "a" * 40 + "[****]" + "b" * 17
    (sample,) = plan([Text("a" * 50), Image(0, 8, 8), Text("b")], long="truncate")
    assert spelled(sample) == "<" + "a" * 50


def test_dropping_leaves_nothing():
    assert plan([Text("a" * 64)], long="drop") == []
    assert len(plan([Text("a" * 62)], long="drop")) == 1


parts = st.one_of(
    st.integers(1, 200).map(lambda n: Text("t" * n)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda size: Image(size, 2 * size[0], 2 * size[1])),
    st.just(Special("<|turn|>")),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(parts, min_size=1, max_size=20), st.integers(1, 2), st.sampled_from([64, 100, 140]))
def test_pieces_fit_a_slot_and_joined_are_the_document(document, rows, patches):
    budget = Budget(64, rows, patches)
    (whole,) = plan(document, Budget(10**6, 1, 10**6))
    pieces = plan(document, budget)
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([piece.targets for piece in pieces]), whole.targets)
    starts = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])
    assert [
        (start + image.start, image.number, image.h, image.w)
        for start, piece in zip(starts, pieces, strict=False)
        for image in piece.images
    ] == [(image.start, image.number, image.h, image.w) for image in whole.images]
    for piece in pieces:
        assert budget.holds(len(piece.tokens), [image.patches for image in piece.images])
        assert np.count_nonzero(piece.tokens == BEGIN) == np.count_nonzero(piece.tokens == END) == len(piece.images)


@pytest.mark.parametrize("length, pieces", [(62, 1), (63, 2), (126, 2), (127, 3), (10_000, 157)])
def test_a_text_is_cut_no_oftener_than_it_must(length, pieces):
    assert len(plan([Text("a" * length)], Budget(64, 1, 16))) == pieces
