"""Where long documents may be cut: never through an image, without crumbs,
at a boundary where one is near.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.vlm.data.packing import Budget
from experiments.vlm.data.split import Splitter, outline_of

SLOT = Budget(seq_len=512, patch_rows=1, patches_per_row=1024)
SPLITTER = Splitter(SLOT, merge_size=2)

text = st.integers(1, 2000).map(lambda tokens: (tokens, 0))
image = st.integers(1, 250).map(lambda visual: (visual + 2, 4 * visual))
documents = st.lists(st.one_of(text, image), min_size=1, max_size=12)


def inside_an_image(outline, token: int) -> bool:
    return any(start < token < end for start, end in zip(outline.starts, outline.ends, strict=True))


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(0, 512), st.integers(0, 256).map(lambda n: 4 * n), st.integers(1, 2), st.data())
def test_a_piece_fits_what_is_left_and_cuts_no_image(parts, tokens, patches, rows, data):
    outline = outline_of(parts)
    splitter = Splitter(Budget(512, rows, 1024 // rows), 2)
    starts = [token for token in range(0, outline.length, 7) if not inside_an_image(outline, token)]
    start = data.draw(st.sampled_from(starts))
    end = splitter.reach(outline, start, tokens, patches)
    assert start <= end <= start + tokens
    assert outline.patches_of(start, end) <= patches
    assert not inside_an_image(outline, end)


@settings(max_examples=200, deadline=None)
@given(documents)
def test_a_document_is_always_brought_to_its_end(parts):
    outline, start, pieces = outline_of(parts), 0, []
    while start < outline.length:
        end = SPLITTER.first(outline, start)
        assert end > start and SLOT.holds(end - start, outline.images(start, end))
        pieces.append((start, end))
        start = end
    assert sum(outline.patches_of(*piece) for piece in pieces) == outline.patches.sum()


@pytest.mark.parametrize(
    "length, left, end",
    [(1000, 100, 100), (110, 100, 110 - 32), (1000, 31, 0), (1000, 32, 32), (100, 100, 100)],
)
def test_neither_a_piece_nor_what_it_leaves_is_a_crumb(length, left, end):
    assert SPLITTER.reach(outline_of([(length, 0)]), 0, left, 0) == end


def test_a_piece_that_was_begun_grows_by_any_amount():
    assert SPLITTER.reach(outline_of([(1000, 0)]), 200, 3, 0, begun=100) == 203


@pytest.mark.parametrize("left, end", [(99, 99), (100, 100), (103, 100), (104, 100), (105, 105)])
def test_a_cut_moves_back_to_a_boundary_that_is_near(left, end):
    assert SPLITTER.reach(outline_of([(100, 0), (400, 0)]), 0, left, 0) == end


def test_text_before_an_image_that_does_not_fit_is_taken():
    outline = outline_of([(100, 0), (102, 400), (500, 0)])
    assert SPLITTER.reach(outline, 0, 512, 399) == 100
    assert SPLITTER.reach(outline, 0, 512, 400) == 512
    assert SPLITTER.reach(outline, 0, 201, 400) == 100


def test_truncation_keeps_the_longest_beginning():
    assert SPLITTER.longest(outline_of([(40, 0), (102, 400), (900, 0)])) == 512
    assert SPLITTER.longest(outline_of([(450, 0), (102, 400), (9, 0)])) == 450


@pytest.mark.parametrize(
    "patches, tokens", [(0, 512), (252, 512), (512, 256), (1024, 170), (1280, 128), (9000, 128)]
)
def test_text_that_goes_in_first_leaves_room_for_the_images_that_slots_are_made_for(patches, tokens):
    splitter = Splitter(Budget(512, 1, patches), 2)
    assert splitter.first(outline_of([(2000, 0)]), 0) == tokens


@pytest.mark.parametrize("tokens, whole", [(128, True), (129, False), (513, False)])
def test_text_that_no_images_could_make_up_for_is_cut(tokens, whole):
    """A slot with 3 patches a token is made for images, which bring at most 4 a token themselves."""
    assert Splitter(Budget(512, 1, 1536), 2).fits(outline_of([(tokens, 0)])) is whole
    assert Splitter(Budget(512, 1, 64), 2).fits(outline_of([(tokens, 0)])) is (tokens <= 512)
