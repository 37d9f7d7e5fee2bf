"""Scenes to words. Every sentence is true of the picture, and none can be guessed without it.

`describe` is the caption of `sees`: one for each picture, about 70 different words. `varied_caption` says the
same in many styles, with more facts about the picture now and then; since its cells have many sizes, it calls
a thing big or small only where the picture holds both.
"""

import random
from collections import Counter

from experiments.vlm.world.scene import Scene, Thing

NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def describe(scene: Scene, sized: bool = True) -> str:
    """`sized`: say how big things are."""
    first = scene.things[0]
    if scene.kind == "single":
        return f"{noun_phrase(first, sized)} {place(first, scene)}"
    if scene.kind == "relation":
        big, small = sorted(scene.things, key=lambda thing: thing.size)
        return f"{noun_phrase(big)} {side_of(big, small)} {noun_phrase(small)}"
    if scene.kind in ("count", "groups"):
        return listed([count_phrase(number, look[not sized :]) for look, number in groups(scene)])
    if scene.kind == "text":
        return f'the {first.colour} text "{written(scene)}"'
    return listed([noun_phrase(thing, sized) for thing in scene.things])


def noun_phrase(thing: Thing, sized: bool = True) -> str:
    """ "a big red circle"; without the size unless `sized`."""
    look = " ".join(thing.look[not sized :])
    return f"an {look}" if look.startswith("orange") else f"a {look}"


def place(thing: Thing, scene: Scene) -> str:
    """Where the centre of its cell lies, in thirds of the picture."""
    down = ("top", "", "bottom")[_third(thing.row, scene.rows)]
    across = ("left", "", "right")[_third(thing.column, scene.columns)]
    return f"at the {down} {across}".replace("  ", " ").rstrip() if down or across else "in the middle"


def _third(index: int, cells: int) -> int:
    return (2 * index + 1) * 3 // (2 * cells)


def side_of(thing: Thing, other: Thing) -> str:
    """Where `thing` lies from `other`, with which it shares a row or a column: "left of", "above" ..."""
    if thing.row == other.row:
        return "left of" if thing.column < other.column else "right of"
    return "above" if thing.row < other.row else "below"


def groups(scene: Scene) -> list[tuple[tuple[str, str, str], int]]:
    """(look, how many), the most first."""
    return Counter(thing.look for thing in scene.things).most_common()


def count_phrase(number: int, look: tuple[str, ...]) -> str:
    """ "three red circles", of a look or the end of one."""
    plural = "" if number == 1 else "es" if look[-1] == "cross" else "s"
    return " ".join((NUMBERS[number], *look)) + plural


def written(scene: Scene) -> str:
    """What a text scene says, its glyphs in reading order."""
    return "".join(thing.shape for thing in scene.things)


def listed(items: list[str]) -> str:
    """ "x, y and z"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


STYLES = {
    "single": (
        "There is {what} {where}.",
        "The picture shows {what} {where}.",
        "{where}, on a dark ground, you can see {what}.",
        "{what}, {where}: nothing else is drawn here.",
    ),
    "relation": (
        "There is {what} {side} {other}.",
        "{what} lies {side} {other}.",
        "We see two things: {other} is {opposite} {what}.",
        "Look for {other}. {side} it there is {what}.",
    ),
    "count": (
        "There are {what} in this picture.",
        "Somebody drew {what}.",
        "On a dark ground we see {what}.",
        "How many things are there? We count {what}.",
    ),
    "groups": (
        "There are two kinds of things: {what}.",
        "Sorted by what they are: {what}.",
        "On a dark ground we see {what}.",
        "The larger group comes first: {what}.",
    ),
    "text": (
        'The sign says "{what}" in {colour}.',
        'Here "{what}" is written in {colour}.',
        'Somebody wrote "{what}", all of it {colour}.',
        'If you read it aloud, the {colour} text is "{what}".',
    ),
    "listing": (
        "From the top left to the bottom right: {what}.",
        "The picture holds {what}.",
        "Row by row we find {what}.",
        "Read it like a page: {what}.",
    ),
}


def varied_caption(scene: Scene, rng: random.Random) -> str:
    """One to four sentences in a style of its own."""
    facts = [fact(scene) for fact in (_proportions, _number_of_things, _painted) if rng.random() < 0.3]
    return " ".join([_capitalise(rng.choice(STYLES[scene.kind]).format(**_words(scene))), *facts])


def _words(scene: Scene) -> dict[str, str]:
    """The words for the places in the styles of the scene's kind."""
    first = scene.things[0]
    if scene.kind == "single":
        return {"what": noun_phrase(first, sized=False), "where": place(first, scene)}
    if scene.kind == "relation":
        big, small = sorted(scene.things, key=lambda thing: thing.size)
        side = side_of(big, small)
        return {
            "what": noun_phrase(big),
            "other": noun_phrase(small),
            "side": side,
            "opposite": OPPOSITE[side],
        }
    if scene.kind == "text":
        return {"what": written(scene), "colour": first.colour}
    return {"what": describe(scene, sized=len({thing.size for thing in scene.things}) > 1)}


def _capitalise(text: str) -> str:
    """The text with a capital letter at the start of each sentence."""
    for mark in (". ", "? "):
        text = mark.join(sentence[:1].upper() + sentence[1:] for sentence in text.split(mark))
    return text


def _proportions(scene: Scene) -> str:
    ratio = scene.columns / scene.rows
    if 2 / 3 < ratio < 3 / 2:
        return (
            "The picture is about as wide as it is tall."
            if ratio == 1
            else "The picture is not quite square."
        )
    long, short = ("wider", "tall") if ratio > 1 else ("taller", "wide")
    return f"The picture is {'much ' if max(ratio, 1 / ratio) >= 3 else ''}{long} than it is {short}."


def _number_of_things(scene: Scene) -> str:
    noun = "character" if scene.kind == "text" else "thing"
    number = len(scene.things)
    return f"The picture holds {NUMBERS[number]} {noun}{'s' if number > 1 else ''}."


GROUND_SENTENCES = {
    "flat": "The ground is even.",
    "gradient": "The ground gets lighter towards the bottom.",
    "grain": "The ground is rough.",
}


def _painted(scene: Scene) -> str:
    return GROUND_SENTENCES[scene.ground]
