"""From a job to what the slots of a split need, and the facts on which their order depends."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import Data, Source, VLMJobConfig
from experiments.vlm.data.chat_template import load_chat_template
from experiments.vlm.data.formats.shard import Shard
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.sources.energon import Split
from experiments.vlm.data.sources.order import Deal
from experiments.vlm.data.sources.shards import format_hint, list_shards, open_shard
from experiments.vlm.model_config import image_plan
from torchtitan.components.tokenizer import Tokenizer

Shards = tuple[str, ...]  # of a source

# What may change where a run goes on, and why: the samples and their order stay as they are.
FREE_OF_DATA = {
    "sources": "each is compared by itself",
    "num_workers": "a slot gives the same rows whichever process runs it",
    "decode_threads": "a slot gives the same rows whichever process runs it",
    "prefetch": "a state is that of the step that was used, not of the one that was read",
    "max_bad_fraction": "it ends a run and changes none",
    "cache_folder": "copies hold what the originals hold",
    "cache_gb": "copies hold what the originals hold",
    "storage_timeout_s": "it ends a run and changes none",
    "allow_private_urls": "where addresses lead is the network's to say, at any time",
    "url_timeout_s": "whether an address answers in time is the network's to say, at any time",
    "resume_changed_data": "it says what to do about a change",
    "join_new_shards": "it says what to do about a change",
    "new_shards_freq": "when shards joined is part of the state",
}
FREE_OF_SOURCE = {
    "name": "it is part of every other name",
    "path": "the same shards may lie elsewhere: their names are compared",
    "columns": "each is compared by itself",
}


@dataclass(frozen=True)
class Setup:
    """All that a process needs to run slots. Picklable."""

    sources: list[Source]
    deals: tuple[Deal, ...]  # of each source
    data: Data
    budget: Budget
    plan: ImagePlan
    tokenizer: Tokenizer
    seed: int
    max_bad_fraction: float
    control: str | None  # a key of CONTROLS

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each source."""
        return tuple(source.weight for source in self.sources)

    def open_shard(self, source: int, path: str) -> Shard:
        """A shard of a source. Raises what `shards.open_shard` does."""
        return open_shard(path, self.sources[source], self.data)

    def hint(self, source: int, path: str) -> str:
        """What would mend a shard in which nothing is good: see `format_hint`."""
        return format_hint(path, self.sources[source], self.data)


def sources_of(job: VLMJobConfig, split: Split) -> list[Source]:
    """The sources of a split, each with a name."""
    sources = job.validation.sources if split == "validation" else job.training_sources()
    return [replace(source, name=source.name or source.format) for source in sources]


def make_setup(
    job: VLMJobConfig,
    tokenizer: Tokenizer,
    split: Split,
    slots: int,
    control: str | None = None,
    shards: Sequence[Shards] = (),
) -> Setup:
    """`slots`: G. `shards`: of each source, if they are listed. Raises ConfigError as `make_deal`."""
    data, sources, held_out = job.data, sources_of(job, split), split == "validation"
    listed = zip(sources, shards or [()] * len(sources), strict=True)
    return Setup(
        sources=sources,
        deals=tuple(make_deal(source, job, slots, held_out, own) for source, own in listed),
        data=data,
        budget=Budget(job.training.seq_len, data.patch_rows, data.patches_per_row),
        plan=image_plan(job),
        tokenizer=tokenizer,
        seed=job.debug.seed,
        max_bad_fraction=1.0 if held_out else data.max_bad_fraction,
        control=control,
    )


def shape_of(setup: Setup, slots: int) -> BatchShape:
    """The sizes of a batch of so many slots."""
    budget, plan = setup.budget, setup.plan
    rows = budget.seq_len, budget.patch_rows, budget.patches_per_row
    return BatchShape(slots, *rows, plan.patch_size, plan.mixes)


def make_deal(source: Source, job: VLMJobConfig, slots: int, held_out: bool, shards: Shards = ()) -> Deal:
    """How a source is dealt. `shards`: if listed. Raises ConfigError for none, or no such template."""
    # one that cannot be used is refused now, not when a worker opens the first shard
    load_chat_template(source.chat_template)
    split: Split = "validation" if held_out else "train"
    shards = shards or tuple(list_shards(source.path, source.format, job.data, split))
    # The held-out split is read in order: shuffling would only cost seeks.
    return Deal(
        source.name,
        shards,
        slots,
        job.debug.seed,
        1 if held_out else passes(source, job),
        source.shuffle and not held_out,
        source.shuffle_buffer,
    )


def passes(source: Source, job: VLMJobConfig) -> int | None:
    """After how many epochs a source of training ends; None: never."""
    return (job.data.epochs or None) if source.repeat else 1


def order_facts(setup: Setup) -> dict[str, Any]:
    """What the order of the samples depends on, by option: each of [data] and of sources that is not free."""
    data, plan = setup.data, setup.plan
    facts: dict[str, Any] = {
        "training.global_batch_size": setup.deals[0].slots,
        "training.seq_len": setup.budget.seq_len,
        "debug.seed": setup.seed,
        "model.tokenizer_path": tokenizer_print(setup.tokenizer),
    }
    facts |= {f"data.{name}": value for name, value in vars(data).items() if name not in FREE_OF_DATA}
    # the model's, where the options leave them open
    facts |= {"data.patch_size": plan.patch_size, "data.spatial_merge_size": plan.merge_size}
    facts["data.resize"] = plan.resize
    for deal, source in zip(setup.deals, setup.sources, strict=True):
        key = f"data.sources[{deal.name}]"
        facts |= {
            f"{key}.{name}": value for name, value in vars(source).items() if name not in FREE_OF_SOURCE
        }
        facts |= {f"{key}.columns.{name}": value for name, value in vars(source.columns).items() if value}
        # The same files may lie elsewhere when the run goes on.
        names = [PurePosixPath(path).name for path in deal.shards]
        facts[f"{key}.path"] = f"{len(names)} shards, {zlib.crc32(json.dumps(names).encode()):08x}"
        if deal.joins:
            facts[f"{key}: shards that joined"] = ", ".join(
                f"{count} from epoch {epoch + 1} on" for epoch, count in deal.joins
            )
        if deal.last_round[1] > 1:
            facts[f"{key}: pieces of a unit in the last round"] = deal.last_round[1]
    return facts


def tokenizer_print(tokenizer: Tokenizer) -> str:
    """Differs between tokenizers that cut text differently, as far as a sentence shows."""
    sentence = "Zwei rote Quadrate (3 x 4) left of the 2nd circle;\n\tété, 日本, 🙂 1234567 don't."
    ids = [
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.image_id,
        tokenizer.begin_image_id,
        tokenizer.end_image_id,
    ]
    checksum = zlib.crc32(json.dumps([ids, tokenizer.encode(sentence)]).encode())
    return f"vocabulary of {tokenizer.vocab_size}, {checksum:08x}"
