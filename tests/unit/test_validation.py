"""Held-out figures, of all and by source, against loops over tokens and documents."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchtitan.components import validation
from torchtitan.components.validation import Scoring, Validator, exact_documents
from torchtitan.tools.signals import StopAsked


def slow_exact(correct, labelled, documents):
    found = {}
    for row in range(len(documents)):
        for column, document in enumerate(documents[row]):
            if labelled[row][column]:
                found[row, document] = found.get((row, document), True) and bool(correct[row][column])
    return found


def test_a_document_is_exact_when_each_of_its_labels_is_right():
    dice = np.random.default_rng(0)
    documents = np.sort(dice.integers(-1, 6, (4, 40)), axis=1)
    labelled = (dice.random((4, 40)) < 0.7) & (documents >= 0)
    correct = (dice.random((4, 40)) < 0.9) & labelled
    assert exact_documents(correct.astype(np.float32), labelled, documents) == slow_exact(
        correct, labelled, documents
    )


def test_a_batch_without_labels_has_no_documents():
    nothing = np.zeros((2, 5), dtype=bool)
    assert exact_documents(nothing.astype(np.float32), nothing, np.full((2, 5), -1)) == {}


SOURCES = ("a", "b/c", "nothing")


def draw_batch(dice: np.random.Generator) -> SimpleNamespace:
    """Documents of the first two sources, samples that say which, and scores."""
    documents = np.sort(dice.integers(-1, 6, (4, 40)), axis=1)
    labels = np.where((dice.random((4, 40)) < 0.7) & (documents >= 0), 7, -100)
    sources = np.where(documents < 0, -1, documents % 2)
    fields = {"labels": labels, "document_ids": documents, "source_ids": sources}
    places = {(row, int(document)) for row in range(4) for document in documents[row] if document >= 0}
    samples = [SimpleNamespace(row=row, document=document) for row, document in sorted(places)]
    correct = dice.random((4, 40)) < 0.9
    scores = np.stack([dice.random((4, 40)) * 3, correct], -1) * (labels >= 0)[..., None]
    tensors = {name: torch.from_numpy(field) for name, field in fields.items()}
    return SimpleNamespace(tensors=tensors, samples=samples, scores=torch.from_numpy(scores))


class Opened:
    """One step of these batches."""

    def __init__(self, batches: list[SimpleNamespace]):
        self.steps = [SimpleNamespace(batches=batches)]

    def __iter__(self):
        return iter(self.steps)

    def close(self):
        pass


def counted_one_by_one(batches: list[SimpleNamespace], holds) -> list[float | None]:
    """loss, right, exact and documents of the documents that `holds` of."""
    nll, right, exact = [], [], []
    for batch in batches:
        documents, labels = (batch.tensors[name].numpy() for name in ("document_ids", "labels"))
        for sample in batch.samples:
            here = (documents[sample.row] == sample.document) & (labels[sample.row] >= 0)
            if not here.any() or not holds(sample):
                continue
            scores = batch.scores[sample.row].numpy()[here]
            nll += scores[:, 0].tolist()
            right += scores[:, 1].tolist()
            exact.append(all(scores[:, 1]))
    documents = len(exact)
    if not documents:
        return [None, None, None, 0]
    return [sum(nll) / len(nll), 100 * sum(right) / len(right), 100 * sum(exact) / documents, documents]


def validator_of(batches: list[SimpleNamespace], groups) -> Validator:
    scores = iter(batches)
    return Validator(
        forward_backward=SimpleNamespace(score=lambda tensors: next(scores).scores),
        mesh=SimpleNamespace(leads=True),
        open_loader=lambda control: Opened(batches),
        to_rank=lambda batch: batch.tensors,
        scoring=Scoring(groups, {}),
        sources=SOURCES,
        steps=-1,
    )


def test_a_signal_ends_an_evaluation_before_its_next_batch(monkeypatch):
    answers = iter([False, True])
    monkeypatch.setattr(validation, "any_rank", lambda holds: next(answers))
    scored = []
    validator = validator_of([draw_batch(np.random.default_rng(1)) for _ in range(3)], {})
    score = validator.forward_backward.score
    validator.forward_backward.score = lambda tensors: scored.append(1) or score(tensors)
    with pytest.raises(StopAsked):
        validator.evaluate()
    assert scored == [1]


def test_held_out_figures_of_each_source_are_those_of_its_documents_alone(monkeypatch):
    monkeypatch.setattr(validation, "sum_over_hosts", dict)
    monkeypatch.setattr(validation, "any_rank", bool)
    dice = np.random.default_rng(1)
    batches = [draw_batch(dice) for _ in range(3)]
    first = {"first": lambda sample: sample.document == 0, "never": lambda sample: False}
    found = validator_of(batches, first).evaluate()
    of = {"": lambda sample: True, "/a": lambda sample: sample.document % 2 == 0}
    of |= {"/b/c": lambda sample: sample.document % 2 == 1, "/nothing": lambda sample: False}
    for source, holds in of.items():
        figures = [found[name + source] for name in ("loss", "right", "exact", "documents")]
        assert figures == pytest.approx(counted_one_by_one(batches, holds)), source
    assert found["first"] == pytest.approx(counted_one_by_one(batches, first["first"])[2])
    assert found["never"] is None  # not 0 %: there was none
    tokens = sum(int((batch.tensors["document_ids"] >= 0).sum()) for batch in batches)
    assert found["tokens/a"] + found["tokens/b/c"] == tokens and found["tokens/nothing"] == 0
