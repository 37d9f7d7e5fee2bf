"""One mesh of ranks in five dimensions, and the flattened meshes that layouts are made of.

    pp  x  dp_replicate  x  dp_shard  x  cp  x  tp          all five always there, size 1 allowed

           |--------- data --------|                ranks with slots of their own
           |------------ loss ------------|         ranks that hold different tokens
                           |---- fsdp ----|         shards of the decoder; TP sums sequence-parallel parts
                           |------- enc --------|   shards of encoder and projector
                                   |-- cptp ---|    ranks that hold the same slots

Encoder and projector are sharded over `enc`, TP ranks included: each of them places only its own tokens'
visual vectors, so each holds a part of the gradient, and summing over all of dp, cp and tp is right whether
the encoding is shared or repeated.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from torchtitan.config.layout import Degrees
from torchtitan.distributed.imagined import ImaginedWorld

DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """The ranks of a run, and this rank's place among them. What each mesh means: the picture above."""

    degrees: Degrees
    device: torch.device
    world: DeviceMesh  # five dimensions
    data: DeviceMesh  # one dimension, as are those below; fsdp and enc have two under HSDP: (copies, shards)
    loss: DeviceMesh
    fsdp: DeviceMesh
    enc: DeviceMesh
    cptp: DeviceMesh

    def __getitem__(self, name: str) -> DeviceMesh:
        """The mesh of one of DIMS."""
        return self.world[name]

    def rank(self, name: str) -> int:
        """This rank's place in one of DIMS."""
        return self.world.get_local_rank(name)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one, among those that hold the same slots, that counts what is in them."""
        return self.rank("pp") == self.rank("cp") == self.rank("tp") == 0


def build_mesh(degrees: Degrees, device: torch.device) -> Mesh:
    """Called by all ranks alike."""
    sizes = tuple(getattr(degrees, name) for name in DIMS)
    world = init_device_mesh(device.type, sizes, mesh_dim_names=DIMS)
    return Mesh(
        degrees=degrees,
        device=device,
        world=world,
        data=world["dp_replicate", "dp_shard"]._flatten("data"),
        loss=world["dp_replicate", "dp_shard", "cp"]._flatten("loss"),
        fsdp=_with_copies(world, world["dp_shard", "cp"]._flatten("fsdp")),
        enc=_with_copies(world, world["dp_shard", "cp", "tp"]._flatten("enc")),
        cptp=world["cp", "tp"]._flatten("cptp"),
    )


def _with_copies(world: DeviceMesh, shards: DeviceMesh) -> DeviceMesh:
    """Under HSDP (copies, shards), else the shards alone."""
    copies = world["dp_replicate"]
    return shards if copies.size() == 1 else DeviceMesh._concatenate([copies, shards])


def own_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be divided over a mesh."""
    return x.to_local() if isinstance(x, DTensor) else x


def imagine_mesh(degrees: Degrees) -> Mesh:
    """The mesh of one rank without the others (imagined.py), for meta tensors.

    Only functions that split a model can use it.
    """
    ranks = {name: getattr(degrees, name) for name in DIMS} | {"cp x tp": degrees.cp * degrees.tp}
    world: Any = ImaginedWorld(ranks)
    none: Any = None
    return Mesh(
        degrees, torch.device("meta"), world, data=none, loss=none, fsdp=none, enc=none, cptp=world["cp x tp"]
    )
