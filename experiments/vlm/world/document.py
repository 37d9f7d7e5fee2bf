"""Interleaved documents of the embedded world, as lists of texts and scenes in reading order.

    album   a title, 1 to 24 pictures with or without a description before or after each, a summary
    quiz    1 to 5 pictures, each with a question and its answer
    story   text alone: 1 to 60 short tales of things that change hands, with the count kept right

Short ones are common and long ones rare, as on the web: a few are longer than a row of 2,048 tokens. A
held-out document has held-out scenes, a held-out story hashes to the held-out side.
"""

import random

from experiments.vlm.world.caption import (
    NUMBERS,
    count_phrase,
    describe,
    groups,
    listed,
    noun_phrase,
    side_of,
    varied_caption,
    written,
)
from experiments.vlm.world.scene import COLOURS, SHAPES, Scene, held_out, varied_scene

Part = str | Scene
LONGEST = 512  # pixels
PEOPLE = ("Mara", "Ben", "Anna", "Tom", "Lena", "Paul", "Nora", "Max", "Ida", "Jon")
TITLES = (
    "Pictures from a small world",
    "An album of shapes and signs",
    "What was found on the wall",
    "Notes of a walk along the signs",
    "Drawings, one after the other",
)


def draw_document(rng: random.Random, heldout: bool) -> list[Part]:
    """A random album, quiz or story of that split, as texts and scenes in reading order."""
    return rng.choices((_album, _quiz, _story), weights=(5, 3, 3))[0](rng, heldout)


def _heavy_tailed(rng: random.Random, most: int) -> int:
    return min(most, int(rng.paretovariate(0.8)))


def _album(rng: random.Random, heldout: bool) -> list[Part]:
    scenes = [varied_scene(rng, heldout, LONGEST) for _ in range(_heavy_tailed(rng, 24))]
    parts: list[Part] = [f"{rng.choice(TITLES)}\n\n"]
    for number, scene in enumerate(scenes):
        caption = varied_caption(scene, rng)
        # Before, after, or not at all: some pictures follow each other without a word between them.
        order: list[list[Part]] = [[f"{caption}\n\n", scene], [scene, f"\n\n{caption}\n\n"], [scene]]
        parts += rng.choice(order)
        if number and rng.random() < 0.4:
            parts.append(_comparison(scenes[number - 1], scene))
    if len(scenes) > 1 and rng.random() < 0.7:
        parts.append(
            f"\n\nThat makes {sum(len(scene.things) for scene in scenes)} things in {len(scenes)} pictures."
        )
    return parts


def _comparison(before: Scene, scene: Scene) -> str:
    change = len(scene.things) - len(before.things)
    amount = "as many things as" if change == 0 else "more things than" if change > 0 else "fewer things than"
    return f"\nThis picture holds {amount} the one before it.\n"


def _quiz(rng: random.Random, heldout: bool) -> list[Part]:
    parts: list[Part] = ["Look at each picture and answer the question.\n"] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 5)):
        scene = varied_scene(rng, heldout, LONGEST)
        question, answer = rng.choice(questions(scene))
        parts += [scene, f"\nQuestion: {question}\nAnswer: {answer}.\n\n"]
    return parts


def questions(scene: Scene) -> list[tuple[str, str]]:
    """All that can be asked of a scene of its kind, with the answers."""
    number = len(scene.things)
    asked = [("How many things are drawn here?", NUMBERS[number])]
    if scene.kind == "single":
        asked += [
            ("What is drawn here, and where?", describe(scene, sized=False)),
            ("What colour is it?", scene.things[0].colour),
        ]
    elif scene.kind == "relation":
        big, small = sorted(scene.things, key=lambda thing: thing.size)
        asked += [
            (f"What is {side_of(big, small)} {noun_phrase(small)}?", noun_phrase(big)),
            ("Which thing is the smaller one?", noun_phrase(small)),
        ]
    elif scene.kind in ("count", "groups"):
        asked += [
            (f"How many {look[2]} shapes are {look[1]}?", NUMBERS[found]) for look, found in groups(scene)
        ]
    elif scene.kind == "text":
        asked += [
            ("What is written here?", written(scene)),
            ("In which colour is it written?", scene.things[0].colour),
        ]
    else:
        asked += [
            (
                "What comes first, and what comes last?",
                f"first {noun_phrase(scene.things[0], False)}, last {noun_phrase(scene.things[-1], False)}",
            )
        ]
    return asked


def _story(rng: random.Random, heldout: bool) -> list[Part]:
    while True:
        text = "\n\n".join(_tale(rng) for _ in range(_heavy_tailed(rng, 16)))
        if held_out(text) == heldout:
            return [text]


def _tale(rng: random.Random) -> str:
    """Somebody gives things away and is given things; what is left is said at the end."""
    owner, friend = rng.sample(PEOPLE, 2)
    looks = [
        (colour, shape)
        for colour, shape in zip(rng.sample(list(COLOURS), 3), rng.sample(SHAPES, 3), strict=True)
    ]
    owned = {look: rng.randint(1, 6) for look in looks[: rng.randint(1, 3)]}
    sentences = [f"{owner} has {_inventory(owned)} in a box."]
    for _ in range(rng.randint(1, 4)):
        look = rng.choice(list(owned))
        if owned[look] and rng.random() < 0.6:
            number = rng.randint(1, owned[look])
            owned[look] -= number
            sentences.append(f"{owner} gives {count_phrase(number, look)} to {friend}.")
        else:
            number = rng.randint(1, 12 - owned[look]) if owned[look] < 12 else 0
            owned[look] += number
            sentences.append(
                f"{friend} brings {count_phrase(number, look)}." if number else f"{friend} brings nothing."
            )
    total = sum(owned.values())
    return " ".join(
        [*sentences, f"Now {owner} has {_inventory(owned)}, {total} thing{'' if total == 1 else 's'} in all."]
    )


def _inventory(owned: dict[tuple[str, str], int]) -> str:
    return listed([count_phrase(number, look) for look, number in owned.items()])
