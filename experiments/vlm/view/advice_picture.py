"""The sizes of a data set's documents, and how full slots of several lengths get, as one PNG."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from experiments.vlm.costs.packing_simulation import Occupancy, SizedDocument

TOKENS, PATCHES = "#3376bd", "#d1793f"


def draw_advice(documents: Sequence[SizedDocument], seen: Sequence[Occupancy], path: str) -> None:
    """Writes a PNG of the documents' sizes and of how full slots of each tried size are."""
    tokens = np.array([sum(part for part, _ in document) for document in documents])
    patches = np.array([sum(part for _, part in document) for document in documents])
    images = np.array([part for document in documents for _, part in document if part])
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(
        f"{len(documents)} documents, {len(images)} images, {patches.sum() / tokens.sum():.3f} patches per "
        "token"
    )
    _histogram(axes[0, 0], tokens, "tokens a document", TOKENS, logarithmic=True)
    _histogram(axes[0, 1], images, "patches an image", PATCHES)
    _histogram(axes[1, 0], patches / tokens, "patches per token of a document", "#5b8c5a")
    _occupancies(axes[1, 1], seen)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _histogram(axes: Axes, values: np.ndarray, name: str, colour: str, logarithmic: bool = False) -> None:
    axes.set_xlabel(name)
    axes.set_ylabel("how many")
    if not len(values):
        return
    if logarithmic:
        axes.set_xscale("log")
        bins = np.geomspace(values.min(), values.max() + 1, 50)
    else:
        bins = np.linspace(values.min(), values.max() + 1e-9, 50)
    axes.hist(values, bins=bins.tolist(), color=colour)
    middle = np.median(values)
    axes.axvline(middle, color="#22262a", lw=1)
    axes.set_title(
        f"median {middle:g}, 95 % up to {np.percentile(values, 95):g}, largest {values.max():g}", fontsize=9
    )


def _occupancies(axes: Axes, seen: Sequence[Occupancy]) -> None:
    """Draw padding rather than occupancy, since differences between 99 and 99.9 % are what matters."""
    names = [
        f"S {o.budget.seq_len}\n{o.budget.patch_rows} x {o.budget.patches_per_row}\nbuffer {o.buffer}"
        for o in seen
    ]
    places = np.arange(len(seen))
    axes.bar(places - 0.2, [100 * (1 - o.tokens) for o in seen], 0.4, color=TOKENS, label="tokens")
    axes.bar(places + 0.2, [100 * (1 - o.patches) for o in seen], 0.4, color=PATCHES, label="patches")
    axes.set_xticks(places, names, fontsize=7)
    axes.set_ylabel("padding, %")
    axes.legend()
