import collections
import random
import re
from dataclasses import replace

import numpy as np
from PIL import Image

from experiments.vlm.world.caption import NUMBERS, describe, varied_caption
from experiments.vlm.world.document import draw_document
from experiments.vlm.world.render import render
from experiments.vlm.world.scene import COLOURS, GLYPHS, GRIDS, SHAPES, Scene, sees_scene, varied_scene
from experiments.vlm.world.sprites import DOTS, sprite
from tests.reference.look import Blob, blobs, glyphs, shape_family

FAMILY = {"oval": "wide", "slab": "wide", "egg": "tall", "post": "tall"}  # the others are even
SAID = {word: number for number, word in enumerate(NUMBERS)}
NOUN = rf"(?:(small|big) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?"


def sees(number: int, kind: str, heldout: bool = False) -> list[tuple[str, Scene, np.ndarray]]:
    rng = random.Random(f"test {kind}")
    found = []
    while len(found) < number:
        scene = sees_scene(rng, heldout)
        if scene.kind == kind:
            found.append((describe(scene), scene, np.asarray(render(scene))))
    return found


def assert_looks(blob: Blob, size: str, colour: str, shape: str) -> None:
    assert blob.colour == colour
    assert shape_family(blob) == FAMILY.get(shape, "even")
    assert ("big" if max(blob.width, blob.height) > 15 else "small") == size


def test_single_captions_say_what_is_seen_and_where():
    for caption, _, image in sees(300, "single"):
        height, width, _ = image.shape
        size, colour, shape, where = re.fullmatch(rf"a {NOUN} (?:at|in) the (.*)", caption).groups()
        [blob] = blobs(image)
        assert_looks(blob, size, colour, shape)
        place = dict.fromkeys(where.split())
        # Thirds of the picture; jitter and the sprite's own rounding move a centre by up to 6 px.
        for axis, extent, first, last in (
            (blob.x, width, "left", "right"),
            (blob.y, height, "top", "bottom"),
        ):
            low, high = (0, 1 / 3) if first in place else (2 / 3, 1) if last in place else (1 / 3, 2 / 3)
            assert low * extent - 6 <= axis <= high * extent + 6, caption


def test_relation_captions_say_how_the_big_thing_lies_to_the_small_one():
    ahead = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for caption, _, image in sees(300, "relation"):
        words = re.fullmatch(rf"a {NOUN} ({'|'.join(ahead)}) a {NOUN}", caption).groups()
        small, big = sorted(blobs(image), key=lambda blob: max(blob.width, blob.height))
        assert_looks(big, *words[:3])
        assert_looks(small, *words[4:])
        dx, dy = ahead[words[3]]
        assert dx * (big.x - small.x) + dy * (big.y - small.y) > 16, caption
        assert abs(dy * (big.x - small.x) + dx * (big.y - small.y)) < 16, caption


def test_count_captions_count():
    for caption, _, image in sees(300, "count"):
        said = collections.Counter()
        for number, _, colour, shape in re.findall(rf"(\w+) {NOUN}", caption):
            said[colour, FAMILY.get(shape, "even")] += SAID[number]
        assert said == collections.Counter((blob.colour, shape_family(blob)) for blob in blobs(image)), (
            caption
        )


def test_text_captions_spell_what_is_written():
    for caption, _, image in sees(300, "text"):
        colour, text = re.fullmatch(rf'the ({"|".join(COLOURS)}) text "([A-Z0-9]+)"', caption).groups()
        assert {glyph.colour for glyph in glyphs(image)} == {colour}
        assert "".join(read(glyph) for glyph in glyphs(image)) == text


def read(blob: Blob) -> str:
    """The glyph whose dots, stretched over its own box, agree best."""

    def agreement(glyph: str) -> float:
        rows = [[row >> (4 - column) & 1 for column in range(5)] for row in bytes.fromhex(DOTS[glyph])]
        inked = np.array(rows, dtype=np.uint8)
        inked = inked[:, inked.any(axis=0)]  # J and 1 are narrower than five dots
        ink = (
            np.asarray(
                Image.fromarray(inked * 255).resize((blob.width, blob.height), Image.Resampling.NEAREST)
            )
            > 0
        )
        stretched = abs(blob.width / blob.height - inked.shape[1] / 7)
        return (ink == blob.mask).mean() - stretched

    return max(GLYPHS, key=agreement)


def test_shapes_look_different_from_each_other():
    for extent in (12, 23):
        pictures = {}
        for shape in SHAPES:
            canvas = Image.new("L", (24, 24))
            mask = sprite(shape, extent)
            canvas.paste(mask, ((24 - mask.width) // 2, (24 - mask.height) // 2))
            pictures[shape] = np.asarray(canvas) / 255
        for a in SHAPES:
            for b in SHAPES[: SHAPES.index(a)]:
                assert (
                    np.abs(pictures[a] - pictures[b]).sum() > 0.1 * np.maximum(pictures[a], pictures[b]).sum()
                ), (a, b)


def test_nothing_touches_its_neighbour_or_the_border():
    for kind in ("count", "relation"):
        for _, scene, image in sees(200, kind):
            assert len(blobs(image)) == len(scene.things)
            border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
            assert border.max() < 115


def test_captions_use_few_words_and_four_kinds():
    rng = random.Random(0)
    scenes = [sees_scene(rng, False) for _ in range(4000)]
    words = {word for scene in scenes for word in re.findall(r'[a-z]+|[,"]|[A-Z0-9]', describe(scene))}
    kinds = collections.Counter(scene.kind for scene in scenes)
    assert 65 <= len(words) <= 90
    assert len(kinds) == 4
    assert min(kinds.values()) > 800


def test_every_grid_comes_and_survives_rounding_to_multiples_of_32():
    rng = random.Random(0)
    seen = collections.Counter()
    for _ in range(2000):
        scene = sees_scene(rng, False)
        assert (round(scene.height / 32), round(scene.width / 32)) == (scene.rows, scene.columns)
        seen[scene.rows, scene.columns] += 1
    assert set(seen) == set(GRIDS)
    assert len(GRIDS) == 23
    assert {(1, 6), (6, 1)} < set(GRIDS)


def test_captions_cannot_be_guessed_from_the_shape_of_the_picture():
    rng = random.Random(0)
    captions: dict[tuple[int, int], collections.Counter] = collections.defaultdict(collections.Counter)
    number = 40_000
    for _ in range(number):
        scene = sees_scene(rng, False)
        captions[scene.rows, scene.columns][describe(scene)] += 1
    guessed = sum(counter.most_common(1)[0][1] for counter in captions.values())
    assert guessed / number < 0.01


def test_no_held_out_arrangement_occurs_in_training():
    train, held = set(), set()
    for seed, draw in enumerate([sees_scene, lambda rng, heldout: varied_scene(rng, heldout, 512)]):
        rng = random.Random(seed)
        train |= {draw(rng, False).arrangement for _ in range(6000)}
        held |= {draw(random.Random(f"other seed {seed} {i}"), True).arrangement for i in range(600)}
    assert len(held) > 500
    assert not train & held


def test_no_held_out_picture_or_story_occurs_in_training():
    rng = random.Random(1)
    pictures = {
        heldout: {render(sees_scene(rng, heldout)).tobytes() for _ in range(1500)}
        for heldout in (False, True)
    }
    assert not pictures[False] & pictures[True]
    stories = {
        heldout: {document[0] for document in documents(200, heldout) if len(document) == 1}
        for heldout in (False, True)
    }
    assert stories[True]
    assert not stories[False] & stories[True]


def documents(number: int, heldout: bool) -> list[list]:
    rng = random.Random(f"documents {heldout}")
    return [draw_document(rng, heldout) for _ in range(number)]


def test_told_captions_name_what_is_there_and_nothing_else():
    rng = random.Random(2)
    for _ in range(1500):
        scene = varied_scene(rng, False, 512)
        caption = varied_caption(scene, rng)
        if scene.kind == "text":
            written = "".join(thing.shape for thing in scene.things)
            assert f'"{written}"' in caption
            assert re.findall("|".join(COLOURS), caption) == [scene.things[0].colour]
            continue
        there = collections.Counter((thing.colour, thing.shape) for thing in scene.things)
        named: collections.Counter = collections.Counter()
        for number, size, colour, shape in re.findall(rf"(\w+) {NOUN}", caption):
            named[colour, shape] += SAID.get(number.lower(), 1)
            assert not size or size in {
                thing.size for thing in scene.things if (thing.colour, thing.shape) == (colour, shape)
            }
        assert named == there, caption


def test_told_captions_measure_the_picture_truthfully():
    rng = random.Random(3)
    for _ in range(1500):
        scene = varied_scene(rng, False, 512)
        caption = varied_caption(scene, rng)
        ratio = scene.width / scene.height
        for words, true in (
            ("wider than", ratio > 1.2),
            ("taller than", ratio < 1 / 1.2),
            ("much wider than", ratio > 2.5),
            ("much taller than", ratio < 1 / 2.5),
            ("about as wide as", 0.85 < ratio < 1.18),
            ("not quite square", 0.6 < ratio < 1.67 and abs(ratio - 1) > 0.1),
            ("ground is even", scene.ground == "flat"),
        ):
            assert true or words not in caption, (caption, ratio)
        for number in re.findall(r"The picture holds (\w+) (?:thing|character)", caption):
            assert SAID[number] == len(scene.things)


def test_grounds_look_as_they_are_called():
    rng = random.Random(5)
    for _ in range(200):
        scene = varied_scene(rng, False, 256)
        ground = np.asarray(render(replace(scene, things=()))).astype(float).mean(axis=2)
        rows = ground.mean(axis=1)
        if scene.ground == "flat":
            assert np.ptp(ground) == 0
        elif scene.ground == "gradient":
            assert rows[-1] - rows[0] > 25
            assert np.ptp(ground, axis=1).max() < 1
        else:
            assert ground.std() > 3


def test_told_relations_hold():
    rng = random.Random(4)
    before = {"left of": lambda a, b: a.column < b.column, "right of": lambda a, b: a.column > b.column}
    before |= {"above": lambda a, b: a.row < b.row, "below": lambda a, b: a.row > b.row}
    seen = set()
    while len(seen) < 16:  # every style with every side
        scene = varied_scene(rng, False, 512)
        if scene.kind != "relation":
            continue
        caption = varied_caption(scene, rng)
        look_for = re.match(rf"Look for an? {NOUN}\. (.*) it there is an? {NOUN}", caption)
        match = look_for or re.search(
            rf"an? {NOUN} (?:is |lies )?({'|'.join(before)}) an? {NOUN}", caption, re.IGNORECASE
        )
        words = match.groups()
        things = {thing.look: thing for thing in scene.things}
        first, second = things[words[:3]], things[words[4:]]
        subject, other = (second, first) if look_for else (first, second)
        assert before[words[3].lower()](subject, other), caption
        seen.add((caption[:2], words[3].lower()))


def test_stories_keep_the_count_right():
    for document in documents(300, False):
        if len(document) > 1:
            continue
        for tale in document[0].split("\n\n"):
            first, *events, last = tale.rstrip(".").split(". ")
            owner = first.split()[0]
            box = collections.Counter()
            for sentence in [first, *events]:
                sign = -1 if sentence.startswith(f"{owner} gives") else 1
                for number, _, colour, shape in re.findall(rf"(\w+) {NOUN}", sentence):
                    box[colour, shape] += sign * SAID[number]
            left = {
                (colour, shape): SAID[number]
                for number, _, colour, shape in re.findall(rf"(\w+) {NOUN}", last)
            }
            assert left == box, tale
            assert int(re.search(r"(\d+) things? in all", last)[1]) == box.total()


def test_documents_compare_and_sum_their_pictures_truthfully():
    for document in documents(200, False):
        scenes: list[Scene] = []
        for part in document:
            if isinstance(part, Scene):
                scenes.append(part)
                continue
            total = re.search(r"That makes (\d+) things in (\d+) pictures", part)
            if total:
                assert (int(total[1]), int(total[2])) == (
                    sum(len(scene.things) for scene in scenes),
                    len(scenes),
                )
            if "the one before it" in part:
                change = len(scenes[-1].things) - len(scenes[-2].things)
                assert {1: "more things than", 0: "as many things as", -1: "fewer things than"}[
                    np.sign(change)
                ] in part


def test_quizzes_are_answered_right():
    for document in documents(400, True):
        for scene, part in zip(document, document[1:], strict=False):
            quiz = (
                re.fullmatch(r"\nQuestion: (.*)\nAnswer: (.*)\.\n\n", part)
                if isinstance(scene, Scene) and isinstance(part, str)
                else None
            )
            if quiz and quiz[1] == "How many things are drawn here?":
                assert SAID[quiz[2]] == len(scene.things)
            if quiz and quiz[1] == "What is written here?":
                assert quiz[2] == "".join(thing.shape for thing in scene.things)
            if quiz and quiz[1] == "Which thing is the smaller one?":
                [small] = [thing for thing in scene.things if thing.size == "small"]
                assert quiz[2].split(" ", 1)[1] == " ".join(small.look)
            if quiz and quiz[1].startswith("How many") and " shapes are " in quiz[1]:
                shape, colour = re.fullmatch(r"How many (\w+) shapes are (\w+)\?", quiz[1]).groups()
                assert SAID[quiz[2]] == sum(
                    (thing.shape, thing.colour) == (shape, colour) for thing in scene.things
                )
