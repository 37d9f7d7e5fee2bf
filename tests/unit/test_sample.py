"""From document to token ids: what is a target, where images stand, and what a piece is."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.vlm.data import document, image_layout
from experiments.vlm.data.document import Document, Image, Special, Text
from experiments.vlm.data.sample import Sample, make_sample
from tests.tiny_data import Characters

TOKENIZER = Characters()
BOS, EOS, IMAGE, BEGIN, END = 256, 257, 259, 260, 261


@dataclass(frozen=True)
class Sizes:
    """An image of (height, width) pixels has as many patches."""

    merge_size: int = 2

    def layout(self, height: int, width: int, alone: bool) -> image_layout.Layout:
        visual = range(height * width // self.merge_size**2)
        view = image_layout.View(height, width, height * width, (height, width))
        return image_layout.Layout((view,), np.array([image_layout.BEGIN, *visual, image_layout.END]))


def sample_of(parts) -> Sample:
    return make_sample(Document("key", parts), TOKENIZER, Sizes())


def spelled(sample: Sample) -> str:
    names = {BOS: "<", EOS: ">", IMAGE: "*", BEGIN: "[", END: "]", 262: "@"}
    return "".join(names.get(token, chr(token)) for token in sample.tokens.tolist())


def targets(sample: Sample) -> str:
    """The tokens that are predicted, the others as dots."""
    return "".join(
        letter if target else "." for letter, target in zip(spelled(sample), sample.targets, strict=True)
    )


def test_text_and_the_end_are_targets_and_images_are_not():
    sample = sample_of([Text("ab"), Image(0, 2, 4), Text("c")])
    assert spelled(sample) == "<ab[**]c>"
    assert targets(sample) == ".ab....c>"
    assert [(image.start, image.end) for image in sample.images] == [(3, 7)]


def test_context_is_no_target():
    sample = sample_of(
        [Special("<|turn|>"), Text("user ", loss=False), Text("answer"), Special("<|turn|>", loss=True)]
    )
    assert spelled(sample) == "<@user answer@>"
    assert targets(sample) == "." * 7 + "answer@>"


def test_an_unknown_marker_is_spelled_out():
    sample = sample_of([Special("<|no|>"), Text("x")])
    assert spelled(sample) == "<<|no|>x>" and targets(sample) == "." * 7 + "x>"


def test_a_conversation_begins_and_ends_as_its_template_writes_it():
    own = [Special(document.BOS), Special("<|turn|>"), Text("a"), Special(document.EOS, True)]
    for parts, written, expected in ((own, "<@a>", "..a>"), (own[1:3], "@a", ".a")):
        sample = make_sample(Document("key", parts, conversation=True), TOKENIZER, Sizes())
        assert (spelled(sample), targets(sample)) == (written, expected)


def test_without_bos_a_document_begins_with_its_first_part():
    tokenizer = Characters(bos_id=None)
    sample = make_sample(Document("key", [Image(0, 2, 2), Text("a")]), tokenizer, Sizes())
    assert (spelled(sample), targets(sample)) == ("[*]a>", "...a>")
    parts = [Special(document.BOS), Text("a")]
    assert spelled(make_sample(Document("key", parts, conversation=True), tokenizer, Sizes())) == "a"


def test_the_placeholder_in_a_text_is_text():
    sample = sample_of([Text("<|image|>")])
    assert IMAGE not in sample.tokens


parts = st.one_of(
    st.integers(1, 200).map(lambda n: Text("t" * n)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda size: Image(size, 2 * size[0], 2 * size[1])),
    st.just(Special("<|turn|>")),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(parts, min_size=1, max_size=20), st.data())
def test_pieces_joined_are_the_document(document, data):
    whole = sample_of(document)
    inside = {token for image in whole.images for token in range(image.start + 1, image.end)}
    allowed = [token for token in range(1, whole.length) if token not in inside]
    cuts = sorted(data.draw(st.sets(st.sampled_from(allowed), max_size=5)) if allowed else [])
    bounds = list(zip([0, *cuts], [*cuts, whole.length], strict=True))
    pieces = [whole.piece(start, end) for start, end in bounds]
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces]), whole.tokens)
    np.testing.assert_array_equal(np.concatenate([piece.targets for piece in pieces]), whole.targets)
    assert [
        (start + image.start, image.number, image.layout)
        for (start, _), piece in zip(bounds, pieces, strict=True)
        for image in piece.images
    ] == [(image.start, image.number, image.layout) for image in whole.images]


@settings(max_examples=50, deadline=None)
@given(st.lists(parts, min_size=1, max_size=20))
def test_the_outline_says_where_images_lie(document):
    sample = sample_of(document)
    outline = sample.outline
    begins, ends = np.flatnonzero(sample.tokens == BEGIN), np.flatnonzero(sample.tokens == END) + 1
    assert (outline.length, outline.starts.tolist(), outline.ends.tolist()) == (
        sample.length,
        begins.tolist(),
        ends.tolist(),
    )
    assert outline.patches.tolist() == [image.layout.cells for image in sample.images]
