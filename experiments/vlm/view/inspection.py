"""Reads steps of a job's training data, and writes the report and the keys."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.loader import Loader
from experiments.vlm.view.keys import lines
from experiments.vlm.view.page import make_page
from experiments.vlm.view.picture import draw_slots
from experiments.vlm.view.slot_view import SlotView, read_slot
from torchtitan.components.data_report import save_report
from torchtitan.components.tokenizer import Tokenizer


@dataclass
class Seen:
    """What was read, in one paragraph for people."""

    steps: int
    slots: int  # in all
    counts: Counter
    tokens: int  # that the slots could hold
    patches: int
    rejected: Counter

    def __str__(self) -> str:
        c = self.counts
        sources = [name.removeprefix("samples/") for name in self.counts if name.startswith("samples/")]
        mixture = ", ".join(
            f"{name} {c[f'samples/{name}']} samples, {c[f'tokens/{name}']} tokens" for name in sources
        )
        bad = (
            "; rejected: " + ", ".join(f"{count} {reason}" for reason, count in self.rejected.items())
            if self.rejected
            else ""
        )
        return (
            f"{self.steps} steps, {self.slots} slots: tokens {c['tokens'] / max(1, self.tokens):.1%}, "
            f"patches {c['patches'] / max(1, self.patches):.1%}, {c['images']} images, {c['loss_tokens']} "
            f"tokens with loss; {mixture}{bad}"
        )


def inspect(job: VLMJobConfig, tokenizer: Tokenizer, steps: int, shown: int, out: str, keys: str) -> Seen:
    """`shown` slots go into the report `out`, every delivered sample into `keys`, what was rejected into the
    job's dump folder.

    Any of them may be empty: then it is not written.
    """
    loader = Loader(job, tokenizer)
    shape, merge = loader.shape, loader.setup.plan.merge_size
    seen, views = Seen(0, 0, Counter(), 0, 0, Counter()), list[SlotView]()
    with ExitStack() as stack:
        stack.callback(loader.close)
        file = stack.enter_context(open(keys, "w", encoding="utf-8")) if keys else None
        for number, step in zip(range(1, steps + 1), loader, strict=False):
            for place, batch in enumerate(step.batches):
                slots = list(loader.slots[place * shape.slots : (place + 1) * shape.slots])
                if file:
                    file.writelines(line + "\n" for line in lines(batch, number, slots))
                if out:
                    rows = range(min(shape.slots, shown - len(views)))
                    views += [
                        read_slot(batch, row, number, slots[row], shape, merge, tokenizer) for row in rows
                    ]
                _count(seen, batch.counts)
                seen.slots += shape.slots
            seen.steps = number
        if job.job.dump_folder:
            folder = Path(job.job.dump_folder)
            folder.mkdir(parents=True, exist_ok=True)
            save_report(folder, loader.report())
    seen.tokens = seen.slots * shape.seq_len
    seen.patches = seen.slots * shape.patch_rows * shape.patches_per_row
    if out:
        _write_report(views, loader, tokenizer, str(seen), out)
    return seen


def _count(seen: Seen, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        if name.startswith("rejected/"):
            seen.rejected[name.removeprefix("rejected/")] += count
        else:
            seen.counts[name] += count


def _write_report(views: list[SlotView], loader: Loader, tokenizer: Tokenizer, facts: str, out: str) -> None:
    title = f"Packed batches of {loader.job.job.config_file or 'the job'}"
    merge = loader.setup.plan.merge_size
    if Path(out).suffix == ".png":
        draw_slots(views, loader.shape, tokenizer, f"{title}\n{facts}", out)
    else:
        Path(out).write_text(
            make_page(views, loader.shape, merge, tokenizer, title, facts),
            encoding="utf-8",
        )
