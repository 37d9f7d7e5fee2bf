"""What a metric returns, how it takes its samples, and how sure its figure is."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.config.errors import UserError

References = Sequence[str] | Sequence[Sequence[str]]  # for each sample one text, or a list of them


@dataclass(frozen=True)
class Score:
    """A metric over a set of samples, in the unit that its function names (percent or a fraction)."""

    overall: float  # the mean of per_sample, or of all samples counted together
    per_sample: list[float]
    parsed: list[object] | None = None  # what was read out of each prediction, where a metric reads
    counts: np.ndarray | None = None  # [n, C] of each sample, where samples are counted together
    of_counts: Callable[[np.ndarray], np.ndarray] | None = None  # their sum [..., C] -> the figure [...]


def mean_score(per_sample: Sequence[float], parsed: list[object] | None = None) -> Score:
    """The Score of a metric that is the mean of its samples."""
    return Score(float(np.mean(per_sample)), [float(score) for score in per_sample], parsed)


def counted_score(counts: np.ndarray, of_counts: Callable[[np.ndarray], np.ndarray]) -> Score:
    """The Score of a metric that counts all samples [n, C] together; of one sample, its counts alone."""
    return Score(float(of_counts(counts.sum(0))), of_counts(counts).tolist(), None, counts, of_counts)


def pairs(metric: str, predictions: Sequence[str], references: References) -> Iterator[tuple[str, list[str]]]:
    """Each prediction with the list of its references. Raises UserError where they do not belong together."""
    for given in (predictions, references):
        if isinstance(given, str | Mapping):
            what = "one text" if isinstance(given, str) else "a table"
            raise UserError(f"{metric}: give a list of predictions and a list of references, not {what}")
    if len(predictions) != len(references):
        raise UserError(
            f"{metric}: {len(predictions)} predictions, but references of {len(references)} samples"
        )
    if not len(predictions):
        raise UserError(f"{metric}: no predictions to score")
    for number, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
            raise UserError(f"{metric}: sample {number} has {texts!r} where references should be")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise UserError(f"{metric}: sample {number} has no reference; leave it out or give it one")
        for text in (prediction, *texts):
            if not isinstance(text, str):
                raise UserError(f"{metric}: sample {number} has {text!r} where a text should be")
        yield prediction, texts


@dataclass(frozen=True)
class Interval:
    """A figure, and where it lies with the confidence that was asked for."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    scores: Score | Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval (Efron, 1979) of a metric, or of the mean of scores [n].

    Samples are drawn anew, and the figure taken of those: the metric of the counts of all of them together
    where that is how it is counted. Which samples there are decides it with the seed, not their order.
    """
    counts, of_counts = _counted(scores)
    if not len(counts) or not 0 < confidence < 1:
        raise UserError(f"an interval needs scores and a confidence between 0 and 1, not {confidence}")
    counts = counts[np.lexsort(counts.T)]
    generator = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // counts.size)  # resamples at a time: 8 MB of counts
    sizes = [(min(rows, resamples - done), len(counts)) for done in range(0, resamples, rows)]
    figures = np.concatenate(
        [of_counts(counts[generator.integers(len(counts), size=size)].sum(axis=1)) for size in sizes]
    )
    low, high = np.quantile(figures, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(of_counts(counts.sum(0))), float(low), float(high))


def _counted(scores: Score | Sequence[float]) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """float64 [n, C], and what makes a figure of a sum of them."""
    if isinstance(scores, Score) and scores.counts is not None and scores.of_counts is not None:
        return np.asarray(scores.counts, np.float64), scores.of_counts
    per_sample = np.asarray(scores.per_sample if isinstance(scores, Score) else scores, np.float64)
    return np.stack((per_sample, np.ones_like(per_sample)), 1), lambda sums: sums[..., 0] / sums[..., 1]
