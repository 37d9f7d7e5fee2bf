"""What a metric returns, how it takes its samples, and how sure the mean of them is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.config.errors import UserError

References = Sequence[str] | Sequence[Sequence[str]]  # of each sample one text, or a list of them


@dataclass(frozen=True)
class Score:
    """A metric over a set of samples, in the unit that its function names (percent or a fraction)."""

    overall: float  # the mean of per_sample, but for BLEU, METEOR and word_accuracy: over the whole set
    per_sample: list[float]
    parsed: list[object] | None = None  # what was read out of each prediction, where a metric reads


def mean_score(per_sample: Sequence[float], parsed: list[object] | None = None) -> Score:
    """The Score of a metric that is the mean of its samples."""
    return Score(float(np.mean(per_sample)), [float(score) for score in per_sample], parsed)


def pairs(metric: str, predictions: Sequence[str], references: References) -> Iterator[tuple[str, list[str]]]:
    """Each prediction with the list of its references. Raises UserError where they do not belong together."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise UserError(f"{metric}: give a list of predictions and a list of references, not one text")
    if len(predictions) != len(references):
        raise UserError(
            f"{metric}: {len(predictions)} predictions, but references of {len(references)} samples"
        )
    if not len(predictions):
        raise UserError(f"{metric}: no predictions to score")
    for number, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError(f"{metric}: sample {number} has no reference; leave it out or give it one")
        for text in (prediction, *texts):
            if not isinstance(text, str):
                raise UserError(f"{metric}: sample {number} has {text!r} where a text should be")
        yield prediction, texts


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with the confidence that was asked for."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    per_sample: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of scores [n] with its percentile bootstrap interval (Efron, 1979).

    Which scores there are decides it with the seed, not their order. BLEU, METEOR and word accuracy are not
    the mean of their samples: this is the interval of the mean all the same.
    """
    scores = np.sort(np.asarray(per_sample, dtype=np.float64))
    if not scores.size or not 0 < confidence < 1:
        raise UserError(f"an interval needs scores and a confidence between 0 and 1, not {confidence}")
    generator = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // scores.size)  # resamples at a time: 8 MB of indices
    sizes = [(min(rows, resamples - done), scores.size) for done in range(0, resamples, rows)]
    means = np.concatenate(
        [scores[generator.integers(scores.size, size=size)].mean(axis=1) for size in sizes]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(scores.mean()), float(low), float(high))
