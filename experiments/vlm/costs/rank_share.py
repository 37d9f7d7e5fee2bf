"""One rank's share of a VLM, run once on the meta device: what its units hold, keep and send.

The share is made by the functions that split and checkpoint the model that trains; this file only adds where
a tower's units are. Among layers that are alike only one is run: alike in what trains, in what backward
computes, and in what it keeps for that. The first layer of a tower is like no other, since others hold its
input too.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import VLMJobConfig
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.vit import VisionEncoder
from experiments.vlm.model.vlm import VLM
from experiments.vlm.model_config import plan_of
from experiments.vlm.parallelism.parallelize import split_decoder, split_encoder
from experiments.vlm.parallelism.shard_batch import shard_batch
from experiments.vlm.parallelism.sharing import part_shares, sharers
from torchtitan.components.float8 import convert
from torchtitan.components.flops import backward_of
from torchtitan.components.freezing import choose_trained
from torchtitan.components.lora import adapt
from torchtitan.components.optimizer import moments, sent_for_updates
from torchtitan.config.layout import Degrees
from torchtitan.config.recomputation import Recomputation
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.estimate import Unit
from torchtitan.distributed.footprint import Footprint, as_one_kernel, footprints, fuse_norms
from torchtitan.distributed.fsdp import Sharding
from torchtitan.distributed.mesh import Mesh, imagine_mesh
from torchtitan.models.decoder.model import Decoder


def build_on_meta(job: VLMJobConfig, config: VLMConfig, vocab_size: int) -> VLM:
    """The whole model on the meta device, frozen where the job freezes it."""
    with torch.device("meta"):
        model = VLM(config, vocab_size, "sdpa", job.training.loss_chunk_tokens)
        adapt(model, job.lora)
        convert(model, job.float8, part_shares(job, config.projector))
    choose_trained(model, job.training)
    return model


class RankShare:
    """One rank's share of a layout, for `slots` slots a forward.

    `on_gpu`: with the kernels of GPUs, else with those of a CPU.
    """

    def __init__(
        self, job: VLMJobConfig, config: VLMConfig, vocab: int, sizes: Degrees, slots: int, on_gpu: bool
    ):
        self._job, self._config = job, config
        self._dtype = getattr(torch, job.training.mixed_precision_param)
        self._update = 2 if on_gpu else 4  # bytes of an element that Muon's ranks exchange
        model, mesh = build_on_meta(job, config, vocab).to(self._dtype), imagine_mesh(sizes)
        self._backward = backward_of(model)
        self._like = self._keep_one_of_each_kind(model)
        split_decoder(model, mesh, _quiet(job, sizes))
        split_encoder(model, mesh, _quiet(job, sizes))
        self._parameters = dict(model.named_parameters())
        batch = meta_batch(job, mesh, slots, plan_of(config, job))
        self.batch_bytes = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
        tokens = slots * job.training.seq_len / (sizes.cp * sizes.tp)
        # what goes from stage to stage
        self.residual_bytes = tokens * config.decoder.dim * self._dtype.itemsize
        table = self._parameters[VLM.TOKEN_TABLES[0]]
        self.tied_numbers = table.numel() if config.decoder.tied_embeddings and table.requires_grad else 0
        self._spans = self._run(model, mesh, batch, on_gpu)

    def _keep_one_of_each_kind(self, model: VLM) -> dict[str, str]:
        """Keep one layer of each kind. Returns which one is run in place of each layer, by full names."""
        ac, like = self._job.activation_checkpoint, {}
        assert model.encoder is not None
        towers: list[tuple[str, VisionEncoder | Decoder, Recomputation, Callable[[str], str]]] = [
            ("encoder", model.encoder, ac.encoder, model.encoder.role),
            ("decoder", model.decoder, ac.decoder, lambda number: ""),
        ]
        for tower_name, tower, recomputation, role in towers:
            first_of: dict[Any, str] = {}
            for number, layer in tower.layers.items():
                name = f"{tower_name}.layers.{number}"
                trained = tuple(parameter.requires_grad for parameter in layer.parameters())
                kept = recomputation.kept(number)
                kind = number == "0", role(number), trained, self._backward[name].inputs, kept
                like[name] = first_of.setdefault(kind, name)
            numbers = [name.rpartition(".")[2] for name in first_of.values()]
            tower.layers = nn.ModuleDict({number: tower.layers[number] for number in numbers})
        return like

    def _run(self, model: VLM, mesh: Mesh, batch: dict[str, Tensor], on_gpu: bool) -> dict[str, Footprint]:
        ac = self._job.activation_checkpoint
        assert model.encoder is not None
        apply_activation_checkpoint(model.encoder.layers, ac.encoder)
        apply_activation_checkpoint(model.decoder.layers, ac.decoder)
        if on_gpu:
            fuse_norms(model)
            if model.decoder.output is not None:
                model.decoder.output.fuse = as_one_kernel
        spans = {name: model.get_submodule(name) for name in _span_names(model)}
        world: Any = mesh.world
        return footprints(spans, lambda: model(**batch), [*model.parameters(), *batch.values()], world.ranks)

    def units(self, sizes: Degrees, layers: range, first: bool, last: bool) -> Iterator[Unit]:
        """The groups of FSDP of a stage with these layers of the decoder, in the order of forward."""
        tied = self._config.decoder.tied_embeddings
        unit = partial(self._unit, copies=sizes.dp_replicate, shards=sizes.dp_shard * sizes.cp, tp=sizes.tp)
        if first:
            yield from self._vision(sizes)
            yield unit("embedding", "decoder.tok_embeddings", ("decoder.tok_embeddings",), stays=tied)
        else:
            # A stage keeps what it received.
            yield Unit("received", use=Footprint(self.residual_bytes))
        for number in layers:
            layer = self._like[f"decoder.layers.{number}"]
            yield unit(f"decoder layer {number}", layer, (layer,))
        if last:
            own = (
                "decoder.norm",
                "decoder.output",
                *(("decoder.tok_embeddings",) if tied and not first else ()),
            )
            # Alone it may stay gathered, since backward starts with it.
            again = tied or not Sharding.of(self._job).keep_last
            yield dataclasses.replace(unit("output layer", "decoder.norm", own), in_backward=again)

    def _vision(self, sizes: Degrees) -> Iterator[Unit]:
        heads = sizes.tp if self._job.parallelism.encoder_tensor_parallel else 1
        shards = sizes.dp_shard * sizes.cp * sizes.tp // heads
        unit = partial(self._unit, copies=sizes.dp_replicate, shards=shards, tp=1)
        ends = ("encoder.embedding", "encoder.norm")  # one group
        yield unit("patch embedding", "encoder.embedding", ends)
        for number in range(self._config.encoder.layers):
            layer = self._like[f"encoder.layers.{number}"]
            yield unit(f"encoder layer {number}", layer, (layer,), tp=heads)
        if self._config.encoder.feature_norm:
            yield unit("encoder norm", "encoder.norm", ())
        yield unit("projector", "projector", ("projector",))

    def _unit(
        self,
        name: str,
        span: str,
        modules: tuple[str, ...],
        *,
        shards: int,
        copies: int,
        tp: int,
        stays: bool = False,
    ) -> Unit:
        """The parameters of `modules`, and the footprint of `span`; they are idle where that does not run."""
        begin = tuple(f"{module}." for module in modules)
        own = {name: parameter for name, parameter in self._parameters.items() if name.startswith(begin)}
        backward = [wants for name, wants in self._backward.items() if f"{name}.".startswith(begin)]
        trained = [(name, parameter) for name, parameter in own.items() if parameter.requires_grad]
        optimizer = self._job.optimizer, VLM.ADAMW_ONLY
        by_rows = VLM.TOKEN_TABLES if self._job.training.trainable_tokens else ()
        numbers, runs = sum(parameter.numel() for parameter in own.values()), span in self._spans
        return Unit(
            name,
            numbers if runs else 0,
            shards,
            copies,
            trained=sum(parameter.numel() for _, parameter in trained),
            in_backward=any(wants.weights or wants.inputs for wants in backward),
            moments=moments(trained, *optimizer, by_rows),
            exchanged=sent_for_updates(trained, *optimizer, shards, tp, self._update),
            stays=stays,
            idle=0 if runs else numbers,
            use=self._spans.get(span, Footprint()),
        )


def _span_names(model: VLM) -> list[str]:
    """Modules in the order of forward; each span of memory and traffic begins with the call of one."""
    assert model.encoder is not None
    encoder = [f"encoder.{name}" for name in model.encoder.running()]
    decoder = [f"decoder.layers.{number}" for number in model.decoder.layers]
    return [*encoder, "projector", "decoder.tok_embeddings", *decoder, "decoder.norm"]


def meta_batch(job: VLMJobConfig, mesh: Mesh, slots: int, plan: ImagePlan) -> dict[str, Tensor]:
    """This rank's arguments of the model, on the meta device."""
    d = job.data
    rows = d.patch_rows, d.patches_per_row
    shape = BatchShape(slots, job.training.seq_len, *rows, plan.patch_size, plan.mixes)
    # Documents are dealt to ranks by their values; pixels are only sliced.
    batch = {
        name: torch.zeros(
            shape.of(name),
            dtype=getattr(torch, field.dtype),
            device="cpu" if field.dims.startswith("BS") else "meta",
        )
        for name, field in shape.fields.items()
    }
    return {name: tensor.to("meta") for name, tensor in shard_batch(batch, mesh, job).items()}


def _quiet(job: VLMJobConfig, sizes: Degrees) -> VLMJobConfig:
    """The job without what only real ranks can do, and without what splitting would log."""
    parallelism = dataclasses.replace(job.parallelism, enable_async_tensor_parallel=False)
    if sharers(job, sizes) == 1:
        parallelism.encoder_sharing = "off"
    return dataclasses.replace(job, parallelism=parallelism)
