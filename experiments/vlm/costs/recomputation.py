"""The least recomputation with which a job stays within activation_checkpoint.memory_budget_gib.

What a layer keeps is measured for each way to keep (rank_share.py); any number of layers in each way is then
put together from that. A tower goes from keeping all, by way of ever more layers that keep what is expensive,
to ever more that keep their inputs alone. What is recomputed costs the products of those layers, and what
they dropped is written once and read twice.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs.rank_share import RankShare
from experiments.vlm.model.vlm import VLM
from experiments.vlm.parallelism.sharing import rows_of_a_rank
from torchtitan.components.flops import forward_flops, total_of
from torchtitan.config.errors import ConfigError
from torchtitan.config.layout import Degrees
from torchtitan.config.recomputation import Kept, Mode, Recomputation
from torchtitan.distributed.estimate import Unit
from torchtitan.tools.hardware import GIB

# An H100 in bfloat16: 60 % of its products a second over its bytes a second.
FLOPS_A_BYTE = 0.6 * 989e12 / 3.35e12
PASSES = 3  # over what was dropped
MODES: dict[Kept, Mode] = {"all": "none", "expensive": "selective", "inputs": "full"}
LayerCounts = tuple[int, int]  # full_layers and selective_layers of a tower


@dataclass(frozen=True)
class TowerCost:
    """What recomputing the layers of a tower costs on a rank."""

    name: str
    layers: int
    flops: float  # of one layer's forward, of what this rank has of a forward's rows

    def options(self, selective: bool) -> list[LayerCounts]:
        """Counts of layers, from the least recomputation to the most."""
        some = [(0, number) for number in range(self.layers + 1)] if selective else [(0, 0)]
        return some + [(number, (self.layers - number) * selective) for number in range(1, self.layers + 1)]


class MixedShare:
    """A rank's share whose layers keep as `keep_as` says, from shares that keep alike in all layers."""

    def __init__(self, shares: Mapping[Kept, RankShare]):
        share = shares["all"]
        self.batch_bytes, self.residual_bytes = share.batch_bytes, share.residual_bytes
        self.tied_numbers = share.tied_numbers
        self.recomputed: dict[str, Recomputation] = {}  # by tower
        self._units = cache(lambda *stage: [list(each.units(*stage)) for each in shares.values()])
        self._ways = list(shares)

    def keep_as(self, job: VLMJobConfig) -> None:
        """From now on, layers keep what this job keeps."""
        ac = job.activation_checkpoint
        self.recomputed = {"encoder": ac.encoder, "decoder": ac.decoder}

    def units(self, sizes: Degrees, layers: range, first: bool, last: bool) -> Iterator[Unit]:
        """As RankShare.units."""
        for units in zip(*self._units(sizes, layers, first, last), strict=True):
            tower, _, number = units[0].name.partition(" layer ")
            kept = self.recomputed[tower].kept(number) if number else "all"
            yield units[self._ways.index(kept)]


def uniform(job: VLMJobConfig, kept: Kept) -> VLMJobConfig:
    """The job with all layers of both towers alike, and no budget."""
    job = with_options(job, (0, 0), (0, 0))
    job.activation_checkpoint.mode = job.activation_checkpoint.encoder_mode = MODES[kept]
    return job


def with_options(job: VLMJobConfig, encoder: LayerCounts, decoder: LayerCounts) -> VLMJobConfig:
    """The job with these layers recomputed, and no budget."""
    job = deepcopy(job)
    ac = job.activation_checkpoint
    ac.memory_budget_gib = 0.0
    ac.encoder_full_layers, ac.encoder_selective_layers = encoder
    ac.full_layers, ac.selective_layers = decoder
    return job


def towers(model: VLM, job: VLMJobConfig, sizes: Degrees) -> tuple[TowerCost, TowerCost]:
    """Encoder and decoder. `model`: whole, on the meta device."""
    assert model.encoder is not None
    forward, (tokens, patches) = forward_flops(model), rows_of_a_rank(job, sizes)
    of_layer = {name: total_of(f"{name}.layers.0", forward) for name in ("encoder", "decoder")}
    return (
        TowerCost("encoder", model.encoder.depth, of_layer["encoder"] * patches),
        TowerCost("decoder", model.config.decoder.layers, of_layer["decoder"] * tokens),
    )


def within_budget(
    job: VLMJobConfig,
    model: VLM,
    shares: Mapping[Kept, RankShare],
    sizes: Degrees,
    peak: Callable[[VLMJobConfig], float],
) -> VLMJobConfig:
    """The job with the cheapest recomputation that stays within its budget. `peak`: bytes of such a job.

    Raises ConfigError where even the most recomputation takes more.
    """
    asked, encoder, decoder = job.activation_checkpoint.memory_budget_gib, *towers(model, job, sizes)
    selective = not job.parallelism.pipeline_parallel_schedule.endswith("ZeroBubble")
    cost, found = _costs(shares, sizes, decoder.layers), []
    of_decoder = decoder.options(selective)
    number = len(of_decoder)  # the more the encoder recomputes, the less the decoder has to
    for of_encoder in encoder.options(selective):
        while number and peak(with_options(job, of_encoder, of_decoder[number - 1])) <= asked * GIB:
            number -= 1
        if number < len(of_decoder):
            seconds = cost(encoder, of_encoder) + cost(decoder, of_decoder[number])
            found.append((seconds, of_encoder, of_decoder[number]))
    if not found:
        least = peak(with_options(job, encoder.options(selective)[-1], decoder.options(selective)[-1]))
        raise ConfigError(
            f"activation_checkpoint.memory_budget_gib = {asked:g}: with every layer recomputed the peak is "
            f"estimated at {least / GIB:.1f} GiB; give more, or shorten training.seq_len, "
            "training.local_batch_size or data.patches_per_row"
        )
    _, *best = min(found)
    return with_options(job, *best)


def _costs(
    shares: Mapping[Kept, RankShare], sizes: Degrees, layers: int
) -> Callable[[TowerCost, LayerCounts], float]:
    """What recomputing costs, in FLOPs that take as long."""
    kept = {
        way: {unit.name: unit.use.kept for unit in share.units(sizes, range(layers), True, True)}
        for way, share in shares.items()
    }

    def cost(tower: TowerCost, options: LayerCounts) -> float:
        last = f"{tower.name} layer {tower.layers - 1}"  # the first is like no other
        dropped = {way: max(0.0, kept["all"][last] - kept[way][last]) for way in shares}
        full, selective = options
        moved = full * dropped["inputs"] + selective * dropped.get("expensive", 0.0)
        return full * tower.flops * (dropped["inputs"] > 0) + PASSES * FLOPS_A_BYTE * moved

    return cost
