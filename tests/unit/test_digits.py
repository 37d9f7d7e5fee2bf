"""Handwritten digits: whose they are, that they stay apart, and that words and pictures agree."""

import hashlib
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from benchmarks.reads import figures
from experiments.vlm.data.formats import FORMATS
from experiments.vlm.world import digits
from experiments.vlm.world.digits import TRAINING, ink, load_digits
from experiments.vlm.world.shards import WORLDS
from experiments.vlm.world.strips import ORDINALS, Strip, ask_for, draw_strip, random_document, random_strip


def test_the_digits_are_those_of_scikit_learn():
    """sklearn/datasets/data/digits.csv.gz: a row of 64 values from 0 to 16 and the label, a byte each."""
    pictures, labels = load_digits()
    held = np.stack([np.asarray(picture)[1:9, 1:9] for picture in pictures]).reshape(-1, 64)
    values = np.ceil(held * (16 / 255))  # of 255, rounded down
    rows = np.column_stack([values, list(map(int, labels))]).astype(np.uint8)
    digest = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"
    assert hashlib.sha256(rows.tobytes()).hexdigest() == digest


def documents(count: int, heldout: bool) -> list[tuple[list[Strip], int]]:
    return [random_document(random.Random(f"{heldout} {number}"), heldout) for number in range(count)]


def test_no_digit_is_both_shown_in_training_and_held_out():
    used = {
        heldout: {
            number for strips, _ in documents(1500, heldout) for strip in strips for number in strip.digits
        }
        for heldout in (False, True)
    }
    assert used[False] == set(range(TRAINING))
    assert used[True] == set(range(TRAINING, len(load_digits()[1])))
    assert (TRAINING, len(load_digits()[1])) == (1300, 1797)


def test_what_blind_guessing_gets_of_held_out_documents_is_well_below_two_percent():
    """It knows how many digits there are, by the size of the picture, and says always the same ones."""
    for heldout, least, most in ((False, 1.0, 3.0), (True, 0.2, 0.8)):
        counts = [len(strips[asked].digits) for strips, asked in documents(4000, heldout)]
        assert least < 100 * np.mean([0.12**count for count in counts]) < most


def test_strips_hold_one_to_twelve_digits_and_reach_from_12_to_1_to_1_to_12():
    rng = random.Random(0)
    strips = [random_strip(rng, False) for _ in range(2000)]
    assert {len(strip.digits) for strip in strips} == set(range(1, 13))
    kinds = {(strip.rows > 1, strip.columns > 1) for strip in strips}
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}
    for rows, columns in ((1, 12), (12, 1)):
        sizes = [
            draw_strip(Strip(rows, columns, 30.0, tuple(range(12))), random.Random(i), False).size
            for i in range(20)
        ]
        ratios = [max(size) / min(size) for size in sizes]
        assert max(ratios) > 11 and {width > height for width, height in sizes} == {columns > rows}
    cells = [strip.cell for strip in strips]
    assert min(cells) < 27 and max(cells) > 37


def test_each_digit_lies_in_its_cell_in_reading_order():
    """What its cell shows is most like it, of all digits of the strip; but for a few that lie aslant."""
    right, labels = [], load_digits()[1]
    for number in range(30):
        rng = random.Random(number)
        strip = random_strip(rng, True)
        pixels = 255.0 - np.asarray(draw_strip(strip, rng, False), np.float64)
        sizes = zip(pixels.shape, (strip.rows, strip.columns), strict=True)
        margin = [(size - cells * strip.cell) / 2 for size, cells in sizes]
        for place, digit in enumerate(strip.digits):
            row, column = divmod(place, strip.columns)
            top, left = round(margin[0] + row * strip.cell), round(margin[1] + column * strip.cell)
            side = round(strip.cell)
            cell = Image.fromarray(pixels[top : top + side, left : left + side]).resize((10, 10))
            likeness = {
                other: np.corrcoef(np.ravel(cell), np.ravel(load_digits()[0][other]))[0, 1]
                for other in strip.digits
            }
            right.append(labels[max(likeness, key=likeness.__getitem__)] == labels[digit])
    assert np.mean(right) > 0.9


def test_ink_of_a_digit_as_it_was_written_is_its_picture_enlarged():
    rng = random.Random(0)
    for number in range(0, 1797, 100):
        mask = ink(number, 32.0, rng, written_anew=False)
        small = np.asarray(mask.resize((10, 10), Image.Resampling.BOX), np.float64)
        assert np.corrcoef(small.ravel(), np.asarray(load_digits()[0][number]).ravel())[0, 1] > 0.97


def test_writing_anew_changes_a_digit_and_keeps_it_inside():
    for number in range(0, 1300, 50):
        plain = np.asarray(ink(number, 32.0, random.Random(0), written_anew=False), np.float64)
        anew = np.asarray(ink(number, 32.0, random.Random(number), written_anew=True), np.float64)
        assert anew.shape == plain.shape and not np.array_equal(anew, plain)
        assert 0.5 < anew.sum() / plain.sum() < 1.7


def test_the_answer_is_that_of_the_picture_that_is_asked_for():
    seen = set()
    for strips, asked in documents(300, False):
        told = ask_for(strips, asked)
        assert told.count("<image>") == len(strips)
        words = told.replace("<image>", "")
        assert words == (f"{ORDINALS[asked]} picture:" if len(strips) > 1 else "picture:")
        assert strips[asked].text.split() == [load_digits()[1][number] for number in strips[asked].digits]
        seen.add((len(strips), asked))
    assert seen == {(count, asked) for count in range(1, 5) for asked in range(count)}


@pytest.mark.parametrize("heldout", [False, True])
def test_a_sample_depends_on_its_seed_alone_and_is_a_conversation(heldout):
    for number in range(30):
        sample = WORLDS["reads"].draw(random.Random(number), heldout, "7")
        assert sample == WORLDS["reads"].draw(random.Random(number), heldout, "7")
        strips, asked = random_document(random.Random(number), heldout)
        record = json.loads(sample["7.json"])
        images = [name for name in sample if name.endswith(".png")]
        assert images == [f"7.{index}.png" for index in range(len(strips))]
        for name, strip in zip(images, strips, strict=True):
            width, height = Image.open(io.BytesIO(sample[name])).size
            wanted = strip.columns / strip.rows
            assert 0.6 < width / height / wanted < 1.6
        draft = FORMATS["llava"].parse(record | {name[2:]: name for name in images})
        assert [turn.role for turn in draft.turns] == ["user", "assistant"]
        assert draft.turns[1].content == [strips[asked].text] == record["answers"]
        assert len(draft.turns[0].content) == len(strips) + 1


def test_held_out_digits_are_shown_as_they_were_written(monkeypatch):
    anew = []
    plain = digits.ink
    monkeypatch.setattr(
        "experiments.vlm.world.strips.ink", lambda *given: anew.append(given[-1]) or plain(*given)
    )
    WORLDS["reads"].draw(random.Random(0), True, "a")
    assert set(anew) == {False}
    WORLDS["reads"].draw(random.Random(0), False, "a")
    assert set(anew) == {False, True}


def test_figures_of_reading_count_digits_and_strips_by_length():
    answers = [("4 0 7", "4 0 7"), ("4 7", "4 0 7"), ("1 " * 7 + "1", "1 " * 8 + "1"), ("1 " * 8 + "1",) * 2]
    found = figures([(said.strip(), right.strip()) for said, right in answers])
    assert found == pytest.approx(
        {"digits": 100 * 22 / 24, "exact": 50.0, "exact, 1-6": 50.0, "exact, 7-12": 50.0}
    )
