"""MMMU's reading of what a model wrote, for multiple choice and for open questions (Yue et al., 2024).

Both give percent, and what was read as `parsed`. The rules are those of its published evaluation.
"""

import random
import re
from collections.abc import Mapping, Sequence

from experiments.vlm.evaluate.metrics.score import References, Score, mean_score, pairs
from torchtitan.config.errors import UserError


def mmmu_multiple_choice(
    predictions: Sequence[str],
    references: References,
    *,
    all_choices: Sequence[Sequence[str]],
    index2ans: Sequence[Mapping[str, str]],
    seed: int = 42,
) -> Score:
    """Whether the choice that a response names is the right one.

    all_choices: of each sample the letters, ["A", "B", "C"]; index2ans: of each sample letter -> text. The
    last that is named wins. A response that names none gets one at random, as published, here drawn from the
    seed and the number of the sample alone.
    """
    samples = list(pairs("mmmu_multiple_choice", predictions, references))
    for name, option in (("all_choices", all_choices), ("index2ans", index2ans)):
        if len(option) != len(samples) or not all(option) or any(isinstance(entry, str) for entry in option):
            raise UserError(f"mmmu_multiple_choice: {name} needs an entry with choices for each prediction")
    parsed: list[object] = []
    correct = []
    for number, (response, right) in enumerate(samples):
        letters = list(all_choices[number])
        choice = parse_choice(response, letters, index2ans[number])
        parsed.append(choice or random.Random(f"{seed} {number}").choice(letters))
        correct.append(100.0 * (parsed[-1] in right))
    return mean_score(correct, parsed)


def parse_choice(response: str, letters: Sequence[str], texts: Mapping[str, str]) -> str | None:
    """The letter that `response` names: (B), else a lone B, else, in more than five words, the text of B."""
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    for form in ("({})", " {} "):
        places = {letter: response.rfind(form.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    if len(response.split()) <= 5:
        return None
    places = {letter: response.lower().rfind(text.lower()) for letter, text in texts.items()}
    return max(places, key=places.__getitem__) if max(places.values(), default=-1) >= 0 else None


def mmmu_open(predictions: Sequence[str], references: References) -> Score:
    """Whether a right answer is in what a response concludes: text inside text, or equal to two decimals."""
    parsed: list[object] = []
    correct = []
    for response, right in pairs("mmmu_open", predictions, references):
        found = parse_open(response)
        parsed.append(found)
        correct.append(100.0 * _holds(found, [form for answer in right for form in _normalise(answer)]))
    return mean_score(correct, parsed)


def _holds(found: list[str | float], right: list[str | float]) -> bool:
    texts = [answer for answer in right if isinstance(answer, str)]
    return any(
        any(answer in item for answer in texts) if isinstance(item, str) else item in right for item in found
    )


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 1.2
)


def parse_open(response: str) -> list[str | float]:
    """What a response concludes, normalised: what stands behind words such as "is", and numbers in it.

    Each line gives one, the last behind an equals sign too. Where no line does, the whole response counts.
    """
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    ends = [_conclusion(line, _INDICATORS) for line in lines[:-1]]
    ends.append(_conclusion(lines[-1], (*_INDICATORS, "=")))
    keys = [end for end in ends if end and end not in tuple(":,.!?;'")] or [response]
    numbers = [number for key in keys for pattern in _NUMBERS for number in re.findall(pattern, key)]
    return list(dict.fromkeys(form for text in (*keys, *numbers) for form in _normalise(text)))


def _conclusion(line: str, indicators: Sequence[str]) -> str:
    """The shortest text behind one of `indicators`. An empty one gives way to any later one, as published."""
    shortest = ""
    for indicator in indicators:
        if indicator in line:
            end = line.split(indicator)[-1].strip()
            if not shortest or len(end) < len(shortest):
                shortest = end
    return shortest


def _normalise(text: str) -> list[str | float]:
    """A number to two decimals, else lower case; a single letter next to a space, so that it stands alone."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
