"""BLEU, ROUGE-L and CIDEr-D of captions, to the last digit of the published scorers of COCO captions.

All take tokenised sentences (ptb_tokens.tokenize) and give fractions, as those scorers do (pycocoevalcap
1.2), CIDEr up to 10. Where that code departs from its papers, so does this.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from experiments.vlm.evaluate.metrics.score import References, Score, counted_score, mean_score, pairs

Ngram = tuple[str, ...]


def _ngrams(sentence: str, longest: int) -> Counter[Ngram]:
    """How often each run of 1 to `longest` words is in `sentence`."""
    words = sentence.split()
    runs = (words[first : first + n] for n in range(1, longest + 1) for first in range(len(words) - n + 1))
    return Counter(map(tuple, runs))


def bleu(predictions: Sequence[str], references: References, n: int = 4) -> Score:
    """Corpus BLEU of 1- to n-grams with the closest reference length (Papineni et al., 2002).

    A count of zero is 1e-15, so a sample without common n-grams has a tiny score, not none.
    """
    counts = np.array([_bleu_counts(*pair, n) for pair in pairs(f"bleu_{n}", predictions, references)])
    return counted_score(counts, partial(_bleu, n=n))


def _bleu_counts(prediction: str, references: list[str], n: int) -> list[int]:
    """Length, closest reference length, then by n-gram size how many there are and how many are found."""
    length = len(prediction.split())
    closest = min((abs(len(text.split()) - length), len(text.split())) for text in references)[1]
    allowed: Counter[Ngram] = Counter()
    for text in references:
        allowed |= _ngrams(text, n)
    found = [0] * n
    for ngram, count in _ngrams(prediction, n).items():
        found[len(ngram) - 1] += min(count, allowed[ngram])
    return [length, closest, *(max(0, length - size) for size in range(n)), *found]


def _bleu(counts: np.ndarray, n: int) -> np.ndarray:
    """counts: [..., 2 + 2n]."""
    small, tiny = 1e-9, 1e-15  # against division by zero
    length, closest = counts[..., 0], counts[..., 1]
    there, found = counts[..., 2 : 2 + n], counts[..., 2 + n :]
    score = ((found + tiny) / (there + small)).prod(-1) ** (1 / n)
    ratio = (length + tiny) / (closest + small)
    return score * np.exp(np.minimum(0, 1 - 1 / ratio))


def rouge_l(predictions: Sequence[str], references: References) -> Score:
    """F of the longest common subsequence, recall weighted 1.2 (Lin, 2004).

    Precision and recall are the best over references, each for itself. An empty text is one empty word.
    """
    return mean_score([_rouge_l(*pair) for pair in pairs("rouge_l", predictions, references)])


def _rouge_l(prediction: str, references: list[str], beta: float = 1.2) -> float:
    words = prediction.split(" ")
    lengths = [(_common_subsequence(words, text.split(" ")), len(text.split(" "))) for text in references]
    precision = max(common / len(words) for common, _ in lengths)
    recall = max(common / length for common, length in lengths)
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common_subsequence(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        before = row
        row = [0]
        for column, other in enumerate(right):
            row.append(before[column] + 1 if word == other else max(before[column + 1], row[column]))
    return row[-1]


def cider(predictions: Sequence[str], references: References, n: int = 4, sigma: float = 6.0) -> Score:
    """CIDEr-D (Vedantam et al., 2015): cosine of clipped TF-IDF of 1- to n-grams, times 10.

    How rare an n-gram is comes from the references of this very set, so a set of one sample scores 0. The
    length penalty counts bigrams, as published.
    """
    samples = list(pairs("cider", predictions, references))
    document_counts = Counter(
        ngram for _, texts in samples for ngram in {g for text in texts for g in _ngrams(text, n)}
    )
    log_samples = math.log(len(samples))
    rarity = {ngram: log_samples - math.log(count) for ngram, count in document_counts.items()}

    def vector(sentence: str) -> _Vector:
        return _Vector(_ngrams(sentence, n), rarity, log_samples, n)

    scores = []
    for prediction, texts in samples:
        hypothesis = vector(prediction)
        scores.append(10 * float(np.mean([hypothesis.similarity(vector(text), sigma) for text in texts])))
    return mean_score(scores)


class _Vector:
    """TF-IDF weights of a sentence by n-gram size, and their norms."""

    def __init__(self, counts: Counter[Ngram], rarity: dict[Ngram, float], rarest: float, n: int) -> None:
        self.weights: list[dict[Ngram, float]] = [{} for _ in range(n)]
        for ngram, count in counts.items():
            self.weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, rarest)
        self.norms = [math.sqrt(sum(weight**2 for weight in weights.values())) for weights in self.weights]
        self.bigrams = sum(count for ngram, count in counts.items() if len(ngram) == 2)

    def similarity(self, reference: "_Vector", sigma: float) -> float:
        total = 0.0
        for mine, theirs, norm, other in zip(
            self.weights, reference.weights, self.norms, reference.norms, strict=True
        ):
            if norm and other:
                common = mine.keys() & theirs.keys()
                total += sum(min(mine[ngram], theirs[ngram]) * theirs[ngram] for ngram in common) / (
                    norm * other
                )
        penalty = math.exp(-((self.bigrams - reference.bigrams) ** 2) / (2 * sigma**2))
        return total * penalty / len(self.weights)
