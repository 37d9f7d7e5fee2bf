"""Held-out loss, the share of tokens that are the most likely ones, and of documents whose every token is.

Given a document's true beginning, the most likely next token is right at every place exactly where greedy
decoding would write the whole document, so no generation is needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from torch import nn

from torchtitan.components.forward_backward import ForwardBackward
from torchtitan.components.loader import Batch, Loader, Tensors
from torchtitan.components.metrics import Values
from torchtitan.components.sinks import Exhibit
from torchtitan.distributed.collectives import any_rank, sum_over_hosts
from torchtitan.distributed.mesh import Mesh
from torchtitan.tools.signals import StopAsked, stop_asked

SUMS = ("nll", "right", "labels", "tokens", "exact", "documents")  # what is added up for each source
TASKS_FOLDER = "tasks"  # below the dump folder: step-N of each time that tasks ran
TASKS_SUMMARY = "summary.json"  # in there, the last that is written


class Tasks(Protocol):
    """What the experiment asks the model while it trains, beyond a forward of held-out batches."""

    def run(self, parts: Sequence[nn.Module], mesh: Mesh, step: int) -> tuple[Values, Sequence[Exhibit]]:
        """TASK/METRIC -> figure, and exhibits for people, on all ranks, which call it together.

        `parts`: of the model, afterwards as before. Files go to TASKS_FOLDER, TASKS_SUMMARY last. Raises
        StopAsked on all ranks where a signal came on one of them.
        """
        ...


@dataclass(frozen=True)
class Scoring:
    """How held-out batches are judged: which samples are counted apart, and how the split is spoilt."""

    groups: Mapping[str, Callable[[Any], bool]]  # name -> is this sample in it: breakdowns of `exact`
    controls: Mapping[str, str]  # ways to spoil the held-out split, for validation.controls, in words


@dataclass(frozen=True)
class Validator:
    """`open_loader(control)` gives the held-out split, as it is or spoilt by a control."""

    forward_backward: ForwardBackward
    mesh: Mesh
    open_loader: Callable[[str | None], Loader]
    to_rank: Callable[[Batch], Tensors]  # host batch -> what this rank's forward takes, on the device
    scoring: Scoring
    sources: tuple[str, ...]  # of the held-out split
    steps: int  # the most batches to look at; -1: all

    def evaluate(self, control: str | None = None) -> Values:
        """Figures over all ranks: loss (nats a token), right (% of tokens), exact (% of documents), exact of
        each group, documents; and the same as NAME/SOURCE, with tokens/SOURCE. None where there was nothing
        to count.

        Raises StopAsked on all ranks, between two batches, where a signal came on one of them.
        """
        by_group = [
            _of_group(what, group) for group in self.scoring.groups for what in ("exact", "documents")
        ]
        by_source = [f"{what}/{source}" for source in self.sources for what in SUMS]
        sums = dict.fromkeys([*by_group, *by_source], 0.0)
        loader = self.open_loader(control)
        try:
            batches = (batch for step in loader for batch in step.batches)
            for batch in islice(batches, self.steps if self.steps >= 0 else None):
                if any_rank(stop_asked()):
                    raise StopAsked
                scores_BS2 = self.forward_backward.score(self.to_rank(batch)).float().cpu().numpy()
                # Ranks that hold the same slots computed the same: one of them counts.
                if self.mesh.leads:
                    self._count(batch, scores_BS2, sums)
        finally:
            loader.close()
        return self._values(sum_over_hosts(sums))

    def _values(self, total: Mapping[str, float]) -> Values:
        of_source = {source: {what: total[f"{what}/{source}"] for what in SUMS} for source in self.sources}
        figures = _figures({what: sum(own[what] for own in of_source.values()) for what in SUMS})
        documents = figures.pop("documents")
        for group in self.scoring.groups:
            exact, of = (total[_of_group(what, group)] for what in ("exact", "documents"))
            figures[group] = _ratio(100 * exact, of)
        figures["documents"] = documents
        for source, own in of_source.items():
            figures_of_source = _figures(own) | {"tokens": own["tokens"]}
            figures |= {f"{name}/{source}": value for name, value in figures_of_source.items()}
        return figures

    def _count(self, batch: Batch, scores_BS2: np.ndarray, sums: dict[str, float]) -> None:
        fields = ("labels", "source_ids", "document_ids")
        labels_BS, source_ids_BS, document_ids_BS = (batch.tensors[name].numpy() for name in fields)
        samples = {(sample.row, sample.document): sample for sample in batch.samples}
        for number, source in enumerate(self.sources):
            is_of_BS = source_ids_BS == number
            labelled_BS = is_of_BS & (labels_BS >= 0)
            nll, right = scores_BS2[labelled_BS].sum(0, dtype=np.float64)
            exact = exact_documents(scores_BS2[..., 1], labelled_BS, document_ids_BS)
            counted = nll, right, labelled_BS.sum(), is_of_BS.sum(), sum(exact.values()), len(exact)
            for what, count in zip(SUMS, counted, strict=True):
                sums[f"{what}/{source}"] += float(count)
            for place, all_right in exact.items():
                for group, holds in self.scoring.groups.items():
                    if place in samples and holds(samples[place]):
                        sums[_of_group("exact", group)] += all_right
                        sums[_of_group("documents", group)] += 1


def _of_group(what: str, group: str) -> str:
    return f"{what} of {group}"


def _figures(sums: Mapping[str, float]) -> Values:
    return {
        "loss": _ratio(sums["nll"], sums["labels"]),
        "right": _ratio(100 * sums["right"], sums["labels"]),
        "exact": _ratio(100 * sums["exact"], sums["documents"]),
        "documents": sums["documents"],
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def exact_documents(
    correct_BS: np.ndarray, labelled_BS: np.ndarray, document_ids_BS: np.ndarray
) -> dict[tuple[int, int], bool]:
    """(row, document) -> whether every label of it was the most likely token.

    Documents without a label are not there.
    """
    rows = np.broadcast_to(np.arange(len(document_ids_BS))[:, None], document_ids_BS.shape)[labelled_BS]
    places, which = np.unique(np.stack([rows, document_ids_BS[labelled_BS]], 1), axis=0, return_inverse=True)
    wrong = np.bincount(which.reshape(-1), weights=correct_BS[labelled_BS] == 0, minlength=len(places))
    return {(int(row), int(document)): bool(n == 0) for (row, document), n in zip(places, wrong, strict=True)}
