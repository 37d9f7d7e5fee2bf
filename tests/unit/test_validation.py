"""The share of documents that are exact, against a loop over tokens."""

import numpy as np

from torchtitan.components.validation import exact_documents


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
