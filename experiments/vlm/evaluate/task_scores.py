"""From the lines of a task to figures: metrics with their intervals, and a score of each record."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.vlm.evaluate.metrics import METRICS, TOKENIZED, Score, bootstrap_interval, tokenize
from experiments.vlm.evaluate.metrics.score import counted_score, mean_score
from experiments.vlm.evaluate.tasks import Line, Question, Task, metric_arguments, right_choice
from torchtitan.config.errors import UserError
from torchtitan.tools.logging import warn_once

ONE_VOTE = (
    "vqa_accuracy takes the answers of several people: where each record has one it is 0, whatever is said; "
    "the tasks exact_match and anls take one"
)


def score(task: Task, questions: list[Question], lines: list[Line]) -> tuple[dict[str, Score], list[str]]:
    """Scores by metric, and metrics that could not be computed, with the reason. Raises UserError.

    A record that could not be asked counts as answered with nothing; a document that could not be read does
    not count.
    """
    if task.way == "choose":
        return _choices(questions, lines), []
    if task.way == "read":
        return _documents(lines), []
    found, left_out = {}, []
    for metric in (*task.metrics, *task.optional):
        try:
            figure = _metric(metric, questions, [line["prediction"] for line in lines])
            found[metric] = _without_luck(figure, lines)
        except UserError as error:
            if metric not in task.optional:
                raise
            left_out.append(str(error))
    return found, left_out


def _metric(metric: str, questions: list[Question], predictions: list[str]) -> Score:
    right, options = metric_arguments(metric, questions)
    if metric == "vqa_accuracy" and all(len(answers) == 1 for answers in right):
        warn_once(ONE_VOTE)
    if metric in TOKENIZED:
        return METRICS[metric](tokenize(predictions), tokenize(right), **options)
    return METRICS[metric](predictions, right, **options)


def _without_luck(found: Score, lines: list[Line]) -> Score:
    """What was not asked is not right, though MMMU draws a choice where nothing is said."""
    lucky = ["error" in line and one > 0 for line, one in zip(lines, found.per_sample, strict=True)]
    if found.counts is not None or not any(lucky):
        return found
    scores = [0.0 if luck else one for luck, one in zip(lucky, found.per_sample, strict=True)]
    return mean_score(scores, found.parsed)


def _choices(questions: list[Question], lines: list[Line]) -> dict[str, Score]:
    """Percent: the likeliest choice is the right one, as a whole and by token."""
    whole, by_token = [], []
    for question, line in zip(questions, lines, strict=True):
        right, totals = right_choice(question), line["logprobs"]
        normed = [total / max(1, tokens) for total, tokens in zip(totals, line["tokens"], strict=True)]
        whole.append(100.0 * (bool(totals) and totals.index(max(totals)) == right))
        by_token.append(100.0 * (bool(normed) and normed.index(max(normed)) == right))
    names = {"accuracy": whole, "accuracy_by_token": by_token}
    return {name: mean_score(scores) for name, scores in names.items()}


def _documents(lines: list[Line]) -> dict[str, Score]:
    """Perplexity, e to the mean negative log-probability: of all tokens, and of each document's."""
    asked = ["error" not in line for line in lines]
    counts = np.array([(line["logprob"], line["tokens"]) for line in lines])
    found = counted_score(counts[asked], _perplexity)
    each = np.where(asked, _perplexity(counts), math.nan)
    return {"perplexity": replace(found, per_sample=each.tolist())}


def _perplexity(counts: np.ndarray) -> np.ndarray:
    """counts: [..., 2], log-probability and tokens."""
    return np.exp(-counts[..., 0] / np.maximum(1, counts[..., 1]))


def summarise(scores: dict[str, Score]) -> dict[str, Any]:
    """For a summary: each figure, its 95 % interval and the number of records."""
    figures = {}
    for name, found in scores.items():
        interval = bootstrap_interval(found)
        figures[name] = {"value": found.overall, "low": interval.low, "high": interval.high}
        figures[name]["records"] = sum(not math.isnan(one) for one in found.per_sample)
    return figures
