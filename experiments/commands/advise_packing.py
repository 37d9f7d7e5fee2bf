"""Which S, L, rows and buffer waste least on a job's data? Decodes nothing, simulates the packer.

    torchtitan-vlm advise --job.config_file vlm_debug --seq_lens 512 1024 2048 --out advice.png

Prints a table and the lines for the TOML: those at which a useful token costs the fewest FLOPs of the job's
model, encoder and decoder, forward and backward, padding of both sides included. L is sought for each S. The
answer comes within half a minute on two cores: --seconds bounds what is read and tried. The picture shows the
sizes of documents and images, and the padding of each row of the table.
"""

import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from experiments.commands.job_options import parse_command
from experiments.vlm.check import check_output, check_sources
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.flops import Work, flops_of_work
from experiments.vlm.costs.packing_advice import (
    Data,
    Deadline,
    Say,
    Trials,
    best_of,
    read_documents,
    search,
    silent,
)
from experiments.vlm.costs.packing_simulation import Case, Occupancy, Prices
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.setup import make_setup
from experiments.vlm.model_config import image_plan, model_config
from experiments.vlm.spec import build_vlm
from torchtitan.components.freezing import choose_trained
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer
from torchtitan.config.devices import available_cores
from torchtitan.config.errors import require
from torchtitan.tools.logging import init_logger

READING = 0.45  # of the time, at most
PROCESSES = 8


@dataclass
class Options:
    """Which documents are read, and which sizes of a slot are tried on them."""

    samples: int = 5000  # documents to read
    seconds: float = 20.0  # for reading and trying together; 0: as long as it takes
    # S to try; none: training.seq_len, half and twice of it
    seq_lens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=lambda: [1])  # data.patch_rows to try
    # data.packing_buffer_size to try; none: that of the job and four times as many
    buffers: list[int] = field(default_factory=list)
    out: str = ""  # a PNG


class Progress:
    """Lines on standard error, one a second."""

    def __init__(self, deadline: Deadline):
        self.clock = deadline.clock
        self.next = self.clock()

    def __call__(self, line: str) -> None:
        if self.clock() >= self.next:
            print(line, file=sys.stderr, flush=True)
            self.next = self.clock() + 1


def prices_of(job: VLMJobConfig, tokenizer: Tokenizer) -> Prices:
    """FLOPs of a row in the job's decoder and encoder, with what is frozen."""
    model = build_vlm(job, tokenizer)
    choose_trained(model, job.training)
    flops, merged = flops_of_work(model), model_config(job).projector.merge_size ** 2
    return Prices(token=flops(Work(0, 1, 0, 0)), patch=flops(Work(merged, 0, 0, 0)) / merged)


def read_data(
    job: VLMJobConfig,
    tokenizer: Tokenizer,
    plan: ImagePlan,
    samples: int,
    deadline: Deadline,
    say: Say = silent,
) -> Data:
    """Documents of the job, and what they cost its model. Raises ConfigError where there are none."""
    prices, setup = prices_of(job, tokenizer), make_setup(job, tokenizer, "train", 1)
    stream = read_documents(setup, samples, deadline.share(READING), say)
    require(bool(stream.documents), "no good sample was found")
    return Data(stream, prices, plan.merge_size, sum(plan.largest))


def the_job_itself(job: VLMJobConfig, plan: ImagePlan) -> Case | None:
    """How the job packs now; None where its largest image would fit no slot."""
    budget = Budget(job.training.seq_len, job.data.patch_rows, job.data.patches_per_row)
    fits = budget.holds(plan.most_tokens, plan.largest)
    return Case(budget, job.data.packing_buffer_size) if fits else None


def _print_row(o: Occupancy, data: Data, mark: str) -> None:
    b = o.budget
    figures = f"{o.tokens:7.2%} {o.patches:8.2%} {o.wasted(data.prices):7.2%} {data.cost(o) / 1e9:9.4g}"
    figures += f" {o.plan_s * 1e3:8.2f} {o.images:7.1f}"
    print(f"{b.seq_len:6} {b.patch_rows:5} {b.patches_per_row:7} {o.buffer:7} {figures}{mark}")


def _print_advice(seen: Sequence[Occupancy], best: Occupancy, now: Case | None, data: Data) -> None:
    prices = data.prices
    print(f"{len(data.stream.documents)} documents, {data.stream.ratio:.3f} patches per token")
    print(
        f"a token costs {prices.token / 1e9:.3g} GFLOPs, a patch {prices.patch / 1e9:.3g}, filled or not; "
        "fewest GFLOPs per useful token are best"
    )
    print("     S  rows       L  buffer  tokens  patches  wasted    GFLOPs  plan ms  images")
    for occupancy in seen:
        is_now = Case(occupancy.budget, occupancy.buffer) == now
        _print_row(occupancy, data, "  the job" * is_now + "  <- best" * (occupancy is best))
    print(
        f"\n[training]\nseq_len = {best.budget.seq_len}\n\n[data]\npatches_per_row = "
        f"{best.budget.patches_per_row}"
    )
    print(f"patch_rows = {best.budget.patch_rows}\npacking_buffer_size = {best.buffer}")


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = parse_command(argv, Options, __doc__)
    check_sources(job)
    check_output(options.out, "--out")
    for key, values in (("samples", [options.samples]), ("rows", options.rows), ("buffers", options.buffers)):
        require(min(values, default=1) >= 1, f"--{key} {' '.join(map(str, values))}: must be 1 or more")
    require(options.seconds >= 0, f"--seconds {options.seconds}: must be 0 or more")
    plan = image_plan(job)
    least, own = plan.most_tokens, job.training.seq_len
    seq_lens = options.seq_lens or [length for length in (own // 2, own, own * 2) if length >= least]
    given = " ".join(map(str, options.seq_lens)) or "is missing"
    too_short = f"--seq_lens {given}: the largest image, of {plan.max_patches} patches, needs {least} tokens"
    require(min(seq_lens, default=0) >= least, too_short)
    deadline = Deadline(options.seconds or math.inf)
    say = Progress(deadline)
    tokenizer = load_tokenizer(job.model.tokenizer_path)
    data = read_data(job, tokenizer, plan, options.samples, deadline, say)
    now = the_job_itself(job, plan)
    buffers = options.buffers or [job.data.packing_buffer_size, 4 * job.data.packing_buffer_size]
    with closing(Trials(data, deadline, min(available_cores(), PROCESSES), say)) as trials:
        seen = search(trials, seq_lens, options.rows, buffers, now)
    best = best_of(seen, data, job.training.seq_len, job.data.packing_buffer_size)
    _print_advice(seen, best, now, data)
    if not deadline.left_s():
        more = f"--seconds {2 * options.seconds:g} tries more"
        print(f"the time was over after {len(trials.seen)} sizes: {more}", file=sys.stderr)
    if options.out:
        from experiments.vlm.view.advice_picture import draw_advice

        draw_advice(data.stream.documents, seen, options.out)
        print(f"\npicture: {options.out}")
    return 0
