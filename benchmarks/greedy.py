"""Is an answer that is written greedily exact on the very samples where teacher forcing says so?

    torchtitan-vlm evaluate --job.dump_folder outputs/vlm_sees --task exact_match=embedded:sees/heldout \\
        --out outputs/vlm_sees/scores
    python -m benchmarks.greedy --run outputs/vlm_sees --answers outputs/vlm_sees/scores/exact_match.jsonl

The held-out split of the run, as its validation reads it, is compared with what `evaluate` wrote about the
same file. Expected: no difference, since both take the most likely token at every place; but for ties, where
two tokens are so nearly as likely (TIE nats) that the order of sums decides.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.notebook import load_job, open_loader, open_model
from experiments.vlm.config import Data, VLMJobConfig
from experiments.vlm.evaluate.questions import Questions
from torchtitan.components.validation import exact_documents
from torchtitan.config.errors import UserError, require

TIE = 1e-3


@dataclass(frozen=True)
class Forced:
    """A sample under teacher forcing."""

    exact: bool
    margin: float  # nats between the two most likely tokens, at the closest of its places


@torch.no_grad()
def teacher_forced(job: VLMJobConfig, checkpoint: str = "") -> dict[str, Forced]:
    """What teacher forcing gives for each held-out sample, by its key."""
    model, found = open_model(job, checkpoint).eval(), {}
    loader = open_loader(job, "validation")
    try:
        for batch in (batch for step in loader for batch in step.batches):
            found |= dict(_of_batch(model, batch))
    finally:
        loader.close()
    return found


def _of_batch(model: torch.nn.Module, batch) -> Iterator[tuple[str, Forced]]:
    tensors = {name: torch.as_tensor(tensor) for name, tensor in batch.tensors.items()}
    labels_BS, documents_BS = tensors["labels"], tensors["document_ids"]
    correct_BS = model(**tensors, per_token=True)[..., 1]
    exact = exact_documents(correct_BS.numpy(), (labels_BS >= 0).numpy(), documents_BS.numpy())
    best_BS2 = model(**tensors | {"labels": None}).topk(2).values
    margin_BS = (best_BS2[..., 0] - best_BS2[..., 1]).where(labels_BS >= 0, torch.inf)
    for sample in batch.samples:
        inside_S = documents_BS[sample.row] == sample.document
        margin = float(margin_BS[sample.row][inside_S].min())
        yield sample.key, Forced(exact[sample.row, sample.document], margin)


def generated(answers: Path) -> dict[str, bool]:
    """Whether each record was answered exactly, by the key of its sample. Raises UserError."""
    summary = json.loads((answers.parent / "summary.json").read_text(encoding="utf-8"))
    shard = Questions(summary["tasks"][answers.stem]["file"], Data()).shard
    lines = map(json.loads, answers.read_bytes().splitlines())
    return {shard.key(line["id"]): line["scores"]["exact_match"] == 100.0 for line in lines}


def compare(forced: Mapping[str, Forced], written: Mapping[str, bool]) -> dict[str, int]:
    """Counts of samples. Raises UserError where these are not the same samples."""
    require(forced.keys() == written.keys(), "the answers are of other samples than those of the validation")
    differ = [key for key, sample in forced.items() if sample.exact != written[key]]
    ties = [key for key in differ if forced[key].margin < TIE]
    return {
        "samples": len(forced),
        "exact, teacher-forced": sum(sample.exact for sample in forced.values()),
        "exact, generated": sum(written.values()),
        "different": len(differ) - len(ties),
        "different by a tie": len(ties),
    }


def main() -> int:
    """Prints the counts, and them as JSON; 1 where the two differ by more than ties."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="dump folder")
    parser.add_argument("--checkpoint", default="", help="step-N; empty: the latest")
    parser.add_argument("--answers", type=Path, required=True, help="TASK.jsonl of an evaluation")
    options = parser.parse_args()
    try:
        forced = teacher_forced(load_job(options.run), options.checkpoint)
        counts = compare(forced, generated(options.answers))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{name:24} {count:6}  {100 * count / counts['samples']:6.1f} %")
    print(json.dumps(counts))
    return int(counts["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
