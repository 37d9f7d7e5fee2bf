"""The encoder inside a group of context- and tensor-parallel ranks, which all hold the same slots.

    shared      each rank encodes its share of the patch rows; they exchange visual tokens
    repeated    each encodes all rows; where these do not divide among the ranks
    heads       tensor parallel: each computes some heads of all rows (of its share under context parallel)

In all three a rank places only the visual tokens of its own part of the sequence, so what it finds for their
gradient is a part of a sum. For `shared` and `repeated` FSDP makes that sum, over the mesh `enc`; for `heads`
the group does.

Letters: N patch rows, V visual tokens a row, D width.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.model.vit import VisionEncoder
from experiments.vlm.parallelism.sharing import rows_a_forward, sharers
from torchtitan.distributed import tensor_parallel as tp
from torchtitan.distributed.differentiable import gather, sum_gradient
from torchtitan.distributed.mesh import Mesh
from torchtitan.tools.logging import logger


def sharing_mesh(job: VLMJobConfig, mesh: Mesh) -> DeviceMesh:
    """The ranks among which the patch rows of a forward are shared."""
    return mesh["cp"] if job.parallelism.encoder_tensor_parallel else mesh.cptp


def own_rows(rows: Tensor, job: VLMJobConfig, mesh: Mesh) -> Tensor:
    """[N, ...] -> [N / sharers, ...]: of the rows of each forward this rank's share, in order."""
    ranks = sharers(job, mesh.degrees)
    if ranks == 1:
        return rows
    forwards = rows.shape[0] // rows_a_forward(job, mesh.degrees)
    shares = rearrange(rows, "(forward rank row) ... -> forward rank row ...", forward=forwards, rank=ranks)
    own = shares[:, sharing_mesh(job, mesh).get_local_rank()]
    return rearrange(own, "forward row ... -> (forward row) ...")


def apply_sharing(projector: nn.Module, job: VLMJobConfig, mesh: Mesh) -> None:
    """The projector returns the visual tokens of all rows, whichever rank encoded them."""
    p, group = job.parallelism, sharing_mesh(job, mesh)
    if p.encoder_tensor_parallel:
        heads = mesh["tp"].get_group()
        projector.register_forward_hook(lambda module, args, visual_NVD: sum_gradient(visual_NVD, heads))
    if sharers(job, mesh.degrees) > 1:
        shared = group.get_group()
        projector.register_forward_hook(lambda module, args, visual_NVD: gather(visual_NVD, 0, shared))
    elif p.encoder_sharing == "auto" and group.size() > 1:
        logger.info(
            f"parallelism.encoder_sharing = auto: {rows_a_forward(job, mesh.degrees)} patch rows a forward "
            f"do not divide among {group.size()} ranks, so each of them encodes all; more slots a forward, "
            "or data.patch_rows, would share the work"
        )


# Norms, scales and the embedding are whole on every rank, and see the whole gradient there.
ENCODER_BLOCK_PLAN = {
    "attention": tp.gathered(arguments=3, split=False),
    "attention.wq": tp.columns(),
    "attention.wk": tp.columns(),
    "attention.wv": tp.columns(),
    "attention.wo": tp.rows(split=False),
    "mlp": tp.gathered(arguments=1, split=False),
    "mlp.fc1": tp.columns(),
    "mlp.fc2": tp.rows(split=False),
}
GATED = {"mlp.gate": tp.columns()}


def apply_encoder_tensor_parallel(encoder: VisionEncoder, mesh: DeviceMesh) -> None:
    """Split heads and MLP columns of every block over `mesh`, in place."""
    plan = ENCODER_BLOCK_PLAN | (GATED if encoder.config.gated_mlp else {})
    for layer in encoder.layers.values():
        tp.split(layer, mesh, plan)
