"""Held-out loss, and the share of documents whose every token is the most likely one.

Given a document's true beginning, the most likely next token is right at every place exactly where greedy
decoding would write the whole document, so no generation is needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from torchtitan.components.forward_backward import ForwardBackward
from torchtitan.components.loader import Batch, Loader, Tensors
from torchtitan.components.metrics import Values
from torchtitan.distributed.collectives import sum_over_hosts
from torchtitan.distributed.mesh import Mesh


@dataclass(frozen=True)
class Scoring:
    """How held-out batches are judged: which fields say what, and which samples are counted apart."""

    documents: str  # field of a batch that says which document a token is of
    labels: str  # field that holds the labels; negative where there is none
    groups: Mapping[str, Callable[[Any], bool]]  # name -> is this sample in it: breakdowns of `exact`
    controls: tuple[str, ...]  # ways to spoil the held-out split, for validation.controls


@dataclass(frozen=True)
class Validator:
    """`open_loader(control)` gives the held-out split, as it is or spoilt by a control."""

    forward_backward: ForwardBackward
    mesh: Mesh
    open_loader: Callable[[str | None], Loader]
    to_rank: Callable[[Batch], Tensors]  # host batch -> what this rank's forward takes, on the device
    scoring: Scoring
    steps: int  # the most batches to look at; -1: all

    def evaluate(self, control: str | None = None) -> Values:
        """loss (nats a token), exact (% of documents) and exact for each group, over all ranks."""
        sums = dict.fromkeys(self._names(), 0.0)
        loader = self.open_loader(control)
        try:
            batches = (batch for step in loader for batch in step.batches)
            for batch in islice(batches, self.steps if self.steps >= 0 else None):
                scores_BS2 = self.forward_backward.score(self.to_rank(batch)).float().cpu().numpy()
                # Ranks that hold the same slots computed the same: one of them counts.
                if self.mesh.leads:
                    self._count(batch, scores_BS2, sums)
        finally:
            loader.close()
        total = sum_over_hosts(sums)
        values: Values = {"loss": total["nll"] / max(1.0, total["tokens"]), "exact": _share(total, "")}
        return (
            values
            | {group: _share(total, group) for group in self.scoring.groups}
            | {"documents": total["documents"]}
        )

    def _names(self) -> list[str]:
        return [
            "nll",
            "tokens",
            *(kind + group for kind in ("documents", "exact") for group in ("", *self.scoring.groups)),
        ]

    def _count(self, batch: Batch, scores_BS2: np.ndarray, sums: dict[str, float]) -> None:
        labelled_BS = batch.tensors[self.scoring.labels].numpy() >= 0
        sums["nll"] += float(scores_BS2[..., 0].sum(dtype=np.float64))
        sums["tokens"] += int(labelled_BS.sum())
        exact = exact_documents(
            scores_BS2[..., 1], labelled_BS, batch.tensors[self.scoring.documents].numpy()
        )
        samples = {(sample.row, sample.document): sample for sample in batch.samples}
        for place, right in exact.items():
            sample = samples.get(place)
            within = [
                group for group, holds in self.scoring.groups.items() if sample is not None and holds(sample)
            ]
            for group in ("", *within):
                sums["documents" + group] += 1
                sums["exact" + group] += right


def _share(total: Mapping[str, float], group: str) -> float:
    return 100 * total["exact" + group] / max(1.0, total["documents" + group])


def exact_documents(
    correct_BS: np.ndarray, labelled_BS: np.ndarray, document_ids_BS: np.ndarray
) -> dict[tuple[int, int], bool]:
    """(row, document) -> was every label of it the most likely token.

    Documents without a label are not there.
    """
    rows = np.broadcast_to(np.arange(len(document_ids_BS))[:, None], document_ids_BS.shape)[labelled_BS]
    places, which = np.unique(np.stack([rows, document_ids_BS[labelled_BS]], 1), axis=0, return_inverse=True)
    wrong = np.bincount(which.reshape(-1), weights=correct_BS[labelled_BS] == 0, minlength=len(places))
    return {(int(row), int(document)): bool(n == 0) for (row, document), n in zip(places, wrong, strict=True)}
