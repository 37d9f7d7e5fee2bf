"""Short answers against those of people: exact, by edit distance, within 5 %, or as VQA counts votes.

All give percent, the best over the references of a sample, and take text as it was generated.
"""

import re
from collections.abc import Sequence

import numpy as np

from experiments.vlm.evaluate.metrics.score import References, Score, counted_score, mean_score, pairs


def exact_match(predictions: Sequence[str], references: References, *, case_sensitive: bool = True) -> Score:
    """Whether a prediction is one of its references, character by character."""
    fold = str if case_sensitive else str.lower
    samples = pairs("exact_match", predictions, references)
    return mean_score([100.0 * (fold(answer) in map(fold, texts)) for answer, texts in samples])


def anls(
    predictions: Sequence[str],
    references: References,
    *,
    case_sensitive: bool = False,
    threshold: float = 0.5,
) -> Score:
    """Average normalised Levenshtein similarity (Biten et al., 2019), as lmms-eval computes it.

    White space counts as one space in the distance and as it is in the length; below `threshold` the score
    is 0, at it not. Two empty texts are alike.
    """
    samples = pairs("anls", predictions, references)
    return mean_score(
        [
            100.0 * max(_similarity(answer, text, case_sensitive, threshold) for text in texts)
            for answer, texts in samples
        ]
    )


def _similarity(left: str, right: str, case_sensitive: bool, threshold: float) -> float:
    if case_sensitive:
        longest = max(len(left), len(right))
    else:  # capitals may be longer: "ß" is "SS"
        longest = max(len(left.upper()), len(right.upper()))
        left, right = left.lower(), right.lower()
    left, right = " ".join(left.split()), " ".join(right.split())
    # The difference in length is a lower bound that spares long texts the square of their length.
    if not longest or 1 - abs(len(left) - len(right)) / longest < threshold:
        return 0.0 if longest else 1.0
    similarity = 1 - _edit_distance(left, right) / longest
    return similarity if similarity >= threshold else 0.0


def word_accuracy(predictions: Sequence[str], references: References) -> Score:
    """Percent of the words that were to be read: 100 less the word error rate, aligned by edit distance.

    A word that is wrong, missing or too many is one error. `overall` counts the words of all samples
    together; a sample below 0 has 0. Where there are several references, the one with the best score counts.
    """
    counts = []
    for answer, texts in pairs("word_accuracy", predictions, references):
        counted = [(_edit_distance(answer.split(), text.split()), len(text.split())) for text in texts]
        counts.append(min(counted, key=lambda found: found[0] / max(1, found[1])))
    return counted_score(np.array(counts), _share_without_errors)


def _share_without_errors(counts: np.ndarray) -> np.ndarray:
    """Percent. counts: [..., 2], errors and words."""
    return 100.0 * np.maximum(0, 1 - counts[..., 0] / np.maximum(1, counts[..., 1]))


def _edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Levenshtein distance, a column of its table at a time: the bits where it goes up, and where down.

    Myers (1999), in the form of Hyyrö (2003).
    """
    full, last = (1 << len(left)) - 1, (1 << len(left)) >> 1
    places: dict[str, int] = {}
    for place, character in enumerate(left):
        places[character] = places.get(character, 0) | 1 << place
    up, down, distance = full, 0, len(left)
    for character in right:
        same = places.get(character, 0)
        diagonal = (((same & up) + up) ^ up) | same
        right_up, right_down = down | full & ~(diagonal | up), up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down, diagonal = right_up << 1 | 1, right_down << 1, same | down
        up, down = full & (right_down | ~(diagonal | right_up)), full & right_up & diagonal
    return distance if left else len(right)


def relaxed_accuracy(
    predictions: Sequence[str], references: References, *, max_relative_change: float = 0.05
) -> Score:
    """ChartQA's (Masry et al., 2022), as in pix2struct: numbers within 5 %, other text alike but for case.

    "45%" is 0.45. A reference of zero is compared as text.
    """
    samples = pairs("relaxed_accuracy", predictions, references)
    return mean_score(
        [
            100.0 * any(_close(answer, text, max_relative_change) for text in texts)
            for answer, texts in samples
        ]
    )


def _close(answer: str, reference: str, max_relative_change: float) -> bool:
    number, target = _number(answer), _number(reference)
    if number is None or not target:
        return answer.lower() == reference.lower()
    return abs(number - target) / abs(target) <= max_relative_change


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS)} | {"none": "0"}
# A word with any one of its apostrophes left out is written as listed here.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
"""
_SPELLINGS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the published table


def vqa_accuracy(predictions: Sequence[str], references: References) -> Score:
    """VQA accuracy (Antol et al., 2015) as its published evaluation computes it.

    An answer has min(votes / 3, 1), averaged over leaving out each person in turn. So it takes four people
    for a full score, and one alone gives 0. Answers are normalised only where people disagree; where all
    wrote the same, the model must write it too.
    """
    return mean_score([100.0 * _votes(*pair) for pair in pairs("vqa_accuracy", predictions, references)])


def _votes(answer: str, people: list[str]) -> float:
    answer, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *people))
    if len(set(people)) > 1:
        answer, *people = (normalise_vqa(text) for text in (answer, *people))
    agree = [person == answer for person in people]
    return sum(min(1.0, (sum(agree) - mine) / 3) for mine in agree) / len(agree)


def normalise_vqa(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes in contractions, punctuation out."""
    number_with_comma = re.search(r"\d,\d", text)
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or number_with_comma else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)  # the published code passes re.UNICODE, 32, as the count
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in ("a", "an", "the"))
