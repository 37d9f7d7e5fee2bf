"""Cross-entropy that never holds all logits: a chunk of tokens at a time, gradients in the same pass.

At a vocabulary of 128k the logits of one slot of 8192 tokens are 4 GB in float32, and autograd would keep
them twice. Here a chunk's logits give its loss and its gradients at once and are gone. With a vocabulary
split over ranks (tensor parallel) each rank holds its V / n columns and three small sums per chunk cross the
group.

Each token may be of a source of data, 0 <= source < sources: what each source adds to the loss comes out of
the same pass.

Letters: T tokens, D width, V vocabulary (this rank's share), G sources.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def _sum_of_exponentials(logits_TV: Tensor, highest_T: Tensor) -> Tensor:
    return (logits_TV.float() - highest_T[:, None]).exp().sum(-1)


def _softmax_minus_one_hot(
    logits_TV: Tensor, highest_T: Tensor, scale_T: Tensor, column_T1: Tensor, here_T: Tensor
) -> Tensor:
    """In the dtype of the logits."""
    d_TV = (logits_TV.float() - highest_T[:, None]).exp() * scale_T[:, None]
    is_label_TV = torch.arange(d_TV.shape[1], device=d_TV.device) == column_T1
    return torch.where(is_label_TV & here_T[:, None], d_TV - 1.0, d_TV).to(logits_TV.dtype)


# A pass over the logits -> the same as one kernel, so that nothing between its input and result is stored.
Fuse = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def _fuse_of(x: Tensor) -> Fuse | None:
    return _compiled if x.is_cuda else None


class _Chunk:
    """Log-sum-exp and label logit of a chunk, of all columns; `ranked`: the most likely token too."""

    def __init__(
        self,
        h_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        group: dist.ProcessGroup | None,
        fuse: Fuse | None,
        ranked: bool = False,
    ):
        self.group, self.fuse = group, fuse
        self.dtype = h_TD.dtype
        self.logits_TV = h_TD @ weight_VD.T
        if fuse is None:
            self.logits_TV = self.logits_TV.float()
        self.labels_T, self.valid_T = labels_T, labels_T >= 0
        first = dist.get_rank(group) * weight_VD.shape[0] if group else 0
        # A label of another rank's columns, or no label, must not index out of range: it reads column 0 and
        # is masked.
        local_T = labels_T - first
        self.here_T = self.valid_T & (local_T >= 0) & (local_T < weight_VD.shape[0])
        self.column_T1 = local_T.where(self.here_T, 0)[:, None]
        self.highest_T = self._reduce(self.logits_TV.amax(-1).float(), dist.ReduceOp.MAX)
        self.best_T = self._first_highest(first) if ranked else None
        label_T = self.logits_TV.gather(-1, self.column_T1)[:, 0].float()
        self.label_T = self._reduce(label_T.where(self.here_T, 0.0))
        self.sum_T = self._reduce(self._sum_T())

    def _sum_T(self) -> Tensor:
        """On GPU reading and writing is what costs: exponentials are made twice there, and never stored. On
        CPU they are made once, in place: a second copy of the logits is what this file exists to avoid.
        """
        if self.fuse:
            return self.fuse(_sum_of_exponentials)(self.logits_TV, self.highest_T)
        self.exp_TV = self.logits_TV.sub_(self.highest_T[:, None]).exp_()
        return self.exp_TV.sum(-1)

    def _reduce(self, x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        if self.group:
            dist.all_reduce(x, op, self.group)
        return x

    def _first_highest(self, first: int) -> Tensor:
        """The token with the highest logit, the first of several as in argmax, alike on all ranks."""
        own_T, column_T = self.logits_TV.max(-1)
        nobody = torch.iinfo(column_T.dtype).max
        return self._reduce((column_T + first).where(own_T == self.highest_T, nobody), dist.ReduceOp.MIN)

    def nll_T(self) -> Tensor:
        return (self.highest_T + self.sum_T.log() - self.label_T).where(self.valid_T, 0.0)

    def correct_T(self) -> Tensor:
        """The label is the most likely token.

        In bfloat16 several often tie; greedy decoding writes the first.
        """
        assert self.best_T is not None
        return self.valid_T & (self.labels_T == self.best_T)

    def dlogits_TV(self) -> Tensor:
        """Softmax minus one-hot, in the dtype of the logits; zero where no loss is due."""
        scale_T = torch.where(self.valid_T, 1.0 / self.sum_T, 0.0)
        if self.fuse:
            places = self.column_T1, self.here_T
            return self.fuse(_softmax_minus_one_hot)(self.logits_TV, self.highest_T, scale_T, *places)
        d_TV = self.exp_TV.mul_(scale_T[:, None])
        d_TV.scatter_add_(-1, self.column_T1, -self.here_T.float()[:, None])
        return d_TV.to(self.dtype)


def _add_product(sum_VD: Tensor, d_VT: Tensor, h_TD: Tensor, fused: bool) -> None:
    """In place, and unrounded where cuBLAS adds a product of bfloat16 to float32."""
    if fused and h_TD.dtype != sum_VD.dtype:
        torch.addmm(sum_VD, d_VT, h_TD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD += d_VT @ h_TD


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, weight_VD, labels_T, chunk, group, fuse, keep_grads, source_ids_T, sources):
        loss = h_TD.new_zeros(1, dtype=torch.float32)
        each_G = h_TD.new_zeros(sources, dtype=torch.float32)
        dh_TD = torch.empty_like(h_TD) if keep_grads and ctx.needs_input_grad[0] else None
        dw_VD = (
            torch.zeros_like(weight_VD, dtype=torch.float32)
            if keep_grads and ctx.needs_input_grad[1]
            else None
        )
        for start in range(0, h_TD.shape[0], chunk):
            part = slice(start, start + chunk)
            piece = _Chunk(h_TD[part], weight_VD, labels_T[part], group, fuse)
            nll_T = piece.nll_T()
            loss += nll_T.sum()
            if sources:
                each_G += sums_by_source(nll_T, source_ids_T[part], sources)
            d_TV = piece.dlogits_TV() if dh_TD is not None or dw_VD is not None else None
            del piece  # or the next chunk's logits would exist along with these
            if d_TV is None:
                continue
            if dh_TD is not None:
                torch.mm(d_TV, weight_VD, out=dh_TD[part])
            if dw_VD is not None:
                _add_product(dw_VD, d_TV.T, h_TD[part], fuse is not None)
            del d_TV
        ctx.save_for_backward(dh_TD, dw_VD)
        ctx.weight_dtype = weight_VD.dtype
        return torch.cat((loss, each_G))

    @staticmethod
    def backward(ctx, grad):
        dh_TD, dw_VD = ctx.saved_tensors
        grad = grad[:1]  # the sources' parts are reported, not trained on
        dh_TD = None if dh_TD is None else dh_TD * grad.to(dh_TD.dtype)
        dw_VD = None if dw_VD is None else (dw_VD * grad).to(ctx.weight_dtype)
        return dh_TD, dw_VD, *(None,) * 7


def cross_entropy_sum(
    h_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk: int,
    group: dist.ProcessGroup | None = None,
    source_ids_T: Tensor | None = None,
    sources: int = 0,
    fuse: Fuse | None = None,
) -> Tensor:
    """Sum over labels >= 0 of -log softmax(h @ weight.T)[label], then what each source has of it, float32
    [1 + sources]; `chunk` tokens' logits exist at a time. The first alone has a gradient.

    With `group`, `weight_VD` is this rank's share of the rows and the gradient of `h_TD` is this rank's part
    of a sum. `fuse`: default on a GPU torch.compile, elsewhere none.
    """
    keep_grads = torch.is_grad_enabled()
    fuse = fuse or _fuse_of(h_TD)
    places = labels_T, chunk, group, fuse, keep_grads, source_ids_T, sources
    return _CrossEntropySum.apply(h_TD, weight_VD, *places)


def sums_by_source(nll_T: Tensor, source_ids_T: Tensor, sources: int) -> Tensor:
    """float32 [sources]. No atomic additions, which would give other bits each time on a GPU."""
    is_of_TG = source_ids_T[:, None] == torch.arange(sources, device=source_ids_T.device)
    return torch.where(is_of_TG, nll_T[:, None], 0.0).sum(0)


def add_up(losses: Sequence[Tensor]) -> Tensor:
    """The sum of losses of several microbatches, [1 + sources] each. The first is added by itself, so that
    its last bit does not depend on the number of sources.
    """
    parts = zip(*(loss.tensor_split([1]) for loss in losses), strict=True)
    return torch.cat([torch.stack(of_all).sum(0) for of_all in parts])


@torch.no_grad()
def token_scores(
    h_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """float32 [T, 2]: negative log-likelihood of each label, and whether it is the most likely token (the
    first of several that are equally likely); 0 where there is none.
    """
    scores = []
    for start in range(0, h_TD.shape[0], chunk):
        part = slice(start, start + chunk)
        piece = _Chunk(h_TD[part], weight_VD, labels_T[part], group, _fuse_of(h_TD), ranked=True)
        scores.append(torch.stack((piece.nll_T(), piece.correct_T().float()), -1))
        del piece
    return torch.cat(scores)


def whole_vocabulary(logits_BSV: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Logits [B, S, V] of all columns, from this rank's.

    For generation and comparison, without gradients where `group` is given.
    """
    if group is None:
        return logits_BSV
    parts = [torch.empty_like(logits_BSV) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits_BSV.detach().contiguous(), group)
    return torch.cat(parts, -1)
