"""Which S, L, rows and buffer waste least on a job's data? Decodes nothing, simulates the packer.

    torchtitan-vlm advise --job.config_file vlm_debug --seq_lens 512 1024 2048 --out advice.png

Prints a table and the lines for the TOML: those at which a useful token costs least (1: full slots of tokens
alone). The picture shows the sizes of documents and images, and the padding of each row of the table.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.__main__ import CONFIG_CLASSES
from experiments.vlm.check import check_output, check_sources
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.setup import make_setup
from experiments.vlm.flops import Work, flops_of_work
from experiments.vlm.model_config import model_config
from experiments.vlm.spec import build_vlm
from experiments.vlm.view.packing_advice import Occupancy, advise, patches_per_token, read_documents
from torchtitan.components.freezing import choose_trained
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer
from torchtitan.config.errors import require
from torchtitan.config.parse import parse_script
from torchtitan.tools.logging import init_logger


@dataclass
class Options:
    """Which documents are read, and which sizes of a slot are tried on them."""

    samples: int = 5000  # documents to read
    # S to try; none: training.seq_len, half and twice of it
    seq_lens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=lambda: [1])  # data.patch_rows to try
    # data.packing_buffer_size to try; none: that of the job and four times as many
    buffers: list[int] = field(default_factory=list)
    out: str = ""  # a PNG


def cost_of_a_patch(job: VLMJobConfig, tokenizer: Tokenizer) -> float:
    """In tokens of the decoder, with what is frozen; attention aside."""
    model = build_vlm(job, tokenizer)
    choose_trained(model, job.training)
    flops, merged = flops_of_work(model), model_config(job).projector.merge_size ** 2
    return flops(Work(merged, 0, 0, 0)) / merged / flops(Work(0, 1, 0, 0))


def _print_row(o: Occupancy, patch_cost: float, best: bool) -> None:
    b = o.budget
    figures = f"{o.tokens:7.2%} {o.patches:8.2%} {o.cost(patch_cost):6.3f} {o.plan_s * 1e3:8.2f}"
    figures += f" {o.images:7.1f} {o.rows:6}"
    print(
        f"{b.seq_len:6} {b.patch_rows:5} {b.patches_per_row:7} {o.buffer:7} {figures}{'  <-' if best else ''}"
    )


def main(argv: Sequence[str]) -> int:
    """The command. Raises UserError."""
    init_logger()
    options, job = parse_script(argv, Options, CONFIG_CLASSES, __doc__ or "")
    assert isinstance(job, VLMJobConfig)
    check_sources(job)
    check_output(options.out, "--out")
    for key, values in (("samples", [options.samples]), ("rows", options.rows), ("buffers", options.buffers)):
        require(min(values, default=1) >= 1, f"--{key} {' '.join(map(str, values))}: must be 1 or more")
    merge, largest = model_config(job).projector.merge_size, job.data.max_patches_per_image
    seq_lens = options.seq_lens or [job.training.seq_len // 2, job.training.seq_len, job.training.seq_len * 2]
    seq_lens = [length for length in seq_lens if length >= largest // merge**2 + 2]
    require(
        bool(seq_lens), f"--seq_lens: none holds the largest image, data.max_patches_per_image = {largest}"
    )
    tokenizer = load_tokenizer(job.model.tokenizer_path)
    patch_cost = cost_of_a_patch(job, tokenizer)
    stream = read_documents(make_setup(job, tokenizer, "train", 1), options.samples)
    require(bool(stream.documents), "no good sample was found")
    print(f"{len(stream.documents)} documents, {patches_per_token(stream.documents):.3f} patches per token")
    print(f"a patch costs {patch_cost:.2f} tokens")
    print("     S  rows       L  buffer  tokens  patches   cost  plan ms  images  slots")
    buffers = options.buffers or [job.data.packing_buffer_size, 4 * job.data.packing_buffer_size]
    tried = itertools.product(seq_lens, options.rows, buffers)
    seen = [
        advise(stream, seq_len, rows, buffer, merge, largest, patch_cost) for seq_len, rows, buffer in tried
    ]
    seen = [occupancy for occupancy in seen if occupancy.rows]
    best = min(seen, key=lambda occupancy: occupancy.cost(patch_cost), default=None)
    for occupancy in seen:
        _print_row(occupancy, patch_cost, occupancy is best)
    if best is None:
        print("too few samples to fill slots: raise --samples, or lower --seq_lens and --buffers")
        return 1
    print(
        f"\n[training]\nseq_len = {best.budget.seq_len}\n\n[data]\npatches_per_row = "
        f"{best.budget.patches_per_row}"
    )
    print(f"patch_rows = {best.budget.patch_rows}\npacking_buffer_size = {best.buffer}")
    if options.out:
        from experiments.vlm.view.advice_picture import draw_advice

        draw_advice(stream.documents, seen, options.out)
        print(f"\npicture: {options.out}")
    return 0
