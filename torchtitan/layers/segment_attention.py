"""Attention segment by segment on CPU, as one opaque operator with its own backward.

A packed row holds many short documents or images. Instead of one dense mask over the row, segments of equal
shape are gathered into one batched call of PyTorch's CPU flash kernel: exactly the same result, several times
faster, and nothing is computed for padding. The loop depends on data, so for torch.compile and activation
checkpointing it is a single operator; below the autograd key nothing is recorded, which is why the backward
calls the kernel's backward itself.

Letters: B batch rows, Q queries, K keys, H heads, G key-value heads, E width of a head.
"""

import functools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten


class _Call(NamedTuple):
    """One batched call: C equal segments, as places in the flattened [B * Q] and [B * K] rows."""

    queries: Tensor  # int64 [C, q]
    keys: Tensor  # int64 [C, k]
    causal: bool  # queries and keys are the same rows: the kernel's own causal mask serves
    first: int  # where causality is not the kernel's, query i sees `first + i` keys; else 0

    def mask(self, like: Tensor) -> Tensor | None:
        """[1, 1, q, k] of 0 and -inf in the dtype of `like`, for the kernel."""
        if not self.first:
            return None
        queries, keys = self.queries.shape[1], self.keys.shape[1]
        return like.new_full((queries, keys), -math.inf).triu(self.first)[None, None]


def _segments_of(seg: np.ndarray, rows: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """(batch row, segment) -> its places in the flattened tensor, in the order of the slot."""
    flat = seg.reshape(-1)
    batch = np.repeat(np.arange(seg.shape[0]), seg.shape[1])
    order = np.lexsort((rows.reshape(-1), flat, batch))
    order = order[flat[order] >= 0]
    if not len(order):
        return {}
    cuts = np.flatnonzero((np.diff(flat[order]) != 0) | (np.diff(batch[order]) != 0)) + 1
    runs = np.split(order, cuts)
    return {(int(batch[run[0]]), int(flat[run[0]])): run for run in runs}


def _causal_runs(queries: np.ndarray, keys: np.ndarray, q_rows: np.ndarray, k_rows: np.ndarray):
    """Cut one document's queries where their rows jump; each run sees the keys up to its last row.

    Yields (queries, keys, first), `first` being how many keys the first query of the run sees. Without
    context parallel this is one run whose queries are its keys.
    """
    q, k = q_rows[queries], k_rows[keys]
    for run in np.split(np.arange(len(q)), np.flatnonzero(np.diff(q) != 1) + 1):
        first, seen = np.searchsorted(k, q[run[[0, -1]]], side="right")
        assert 1 <= first == seen - len(run) + 1, (
            "the keys of a document must hold every row that its queries hold"
        )
        yield queries[run], keys[:seen], int(first)


def _plan(q_seg: Tensor, k_seg: Tensor, q_row: Tensor, k_row: Tensor, causal: bool) -> list[_Call]:
    arrays = (x.numpy() for x in (q_seg, k_seg, q_row, k_row))
    return _plan_of(*((x.shape, x.dtype.str, x.tobytes()) for x in arrays), causal)


@functools.lru_cache(maxsize=8)  # every layer of a tower asks for the same, forward and backward
def _plan_of(*described: Any) -> list[_Call]:
    """The calls for segments and rows, given as (shape, dtype, bytes), and whether the mask is causal."""
    *arrays, causal = described
    q_segments, k_segments, q_rows, k_rows = (
        np.frombuffer(data, dtype).reshape(shape) for shape, dtype, data in arrays
    )
    key_places = _segments_of(k_segments, k_rows)
    groups = defaultdict(list)
    for segment, queries in _segments_of(q_segments, q_rows).items():
        keys = key_places.get(segment)
        if keys is None:
            continue
        if not causal:
            groups[len(queries), len(keys), 0].append((queries, keys))
            continue
        for run, seen, first in _causal_runs(queries, keys, q_rows.reshape(-1), k_rows.reshape(-1)):
            groups[len(run), len(seen), first].append((run, seen))
    return [_call(members, causal, first) for (_, _, first), members in groups.items()]


def _call(members: list[tuple[np.ndarray, np.ndarray]], causal: bool, first: int) -> _Call:
    queries = torch.from_numpy(np.stack([q for q, _ in members]))
    keys = torch.from_numpy(np.stack([k for _, k in members]))
    q, k = queries.shape[1], keys.shape[1]
    if not causal or q == 1:
        return _Call(queries, keys, False, 0)
    if q == k and first == 1:
        return _Call(queries, keys, True, 0)
    # Within a run rows are consecutive, and so are the keys that it ends on.
    return _Call(queries, keys, False, first)


def _pick(x_BSHE: Tensor, places: Tensor) -> Tensor:
    """[C, H, s, E] of the given places; a view where they are one run."""
    flat = x_BSHE.reshape(-1, *x_BSHE.shape[2:])
    first, count = int(places[0, 0]), places.shape[1]
    is_run = len(places) == 1 and np.array_equal(places[0].numpy(), np.arange(first, first + count))
    return (flat[None, first : first + count] if is_run else flat[places]).transpose(1, 2)


def _gather(x_BSHE: Tensor, places: Tensor, heads: int) -> Tensor:
    """The same with key-value heads repeated up to `heads`."""
    picked = _pick(x_BSHE, places)
    return picked.repeat_interleave(heads // picked.shape[1], dim=1) if picked.shape[1] != heads else picked


def _attend(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One call: (out [C, H, q, E], logsumexp [C, H, q])."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads != kv_heads and not call.causal and not call.first:
        # Every query sees all keys, so heads that share keys are further queries, and no key is copied.
        groups_CGqE = _pick(q, call.queries).unflatten(1, (kv_heads, -1)).flatten(2, 3)
        args = groups_CGqE, _pick(k, call.keys), _pick(v, call.keys)
        o, log = aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, False)
        return tuple(x.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2) for x in (o, log))
    args = _gather(q, call.queries, heads), _gather(k, call.keys, heads), _gather(v, call.keys, heads)
    return aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, call.causal, attn_mask=call.mask(q))


@torch.library.custom_op("torchtitan::segment_attention", mutates_args=())
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, q_seg: Tensor, k_seg: Tensor, q_row: Tensor, k_row: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """q [B, Q, H, E], k and v [B, K, G, E], segments and rows int32 [B, Q] and [B, K] -> (out [B, Q, H, E],
    logsumexp [B, Q, H]).

    A query that may attend to nothing gives zeros.
    """
    heads = q.shape[2]
    out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[:3], dtype=torch.float32)
    for call in _plan(q_seg, k_seg, q_row, k_row, causal):
        o, log = _attend(call, q, k, v)
        out.view(-1, *out.shape[2:])[call.queries] = o.transpose(1, 2)
        lse.view(-1, heads)[call.queries] = log.transpose(1, 2).to(torch.float32)
    return out, lse


@torch.library.custom_op("torchtitan::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_seg: Tensor,
    k_seg: Tensor,
    q_row: Tensor,
    k_row: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = q.shape[2]
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    for call in _plan(q_seg, k_seg, q_row, k_row, causal):
        at_q, at_k = call.queries, call.keys
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(
                _gather(x, at, heads).contiguous()
                for x, at in ((grad, at_q), (q, at_q), (k, at_k), (v, at_k), (out, at_q))
            ),
            lse.view(-1, heads)[at_q].transpose(1, 2).contiguous(),
            0.0,
            call.causal,
            attn_mask=call.mask(q),
        )
        dq.view(-1, *dq.shape[2:])[at_q] = grads[0].transpose(1, 2)
        for whole, part in ((dk, grads[1]), (dv, grads[2])):
            summed = part.unflatten(1, (whole.shape[2], -1)).sum(2).transpose(1, 2)
            # Several runs of a document share keys, hence add and not assign.
            whole.view(-1, *whole.shape[2:]).index_add_(0, at_k.flatten(), summed.flatten(0, 1))
    return dq, dk, dv


@segment_attention.register_fake
def _(q, k, v, q_seg, k_seg, q_row, k_row, causal):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_segment_attention_backward.register_fake
def _(grad, q, k, v, out, lse, q_seg, k_seg, q_row, k_row, causal):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, *where, out, lse = ctx.saved_tensors
    grads = _segment_attention_backward(grad_out, q, k, v, out, lse, *where, ctx.causal)
    return *grads, None, None, None, None, None


segment_attention.register_autograd(_backward, setup_context=_setup_context)


def _flops(
    q: Tensor, k: Tensor, q_seg: Tensor, k_seg: Tensor, q_row: Tensor, k_row: Tensor, causal: bool
) -> int:
    """Two products of E multiply-adds an allowed pair and head; a causal call counts whole, as in PyTorch."""
    pairs = sum(
        call.queries.numel() * call.keys.shape[1] for call in _plan(q_seg, k_seg, q_row, k_row, causal)
    )
    return 4 * pairs * q.shape[2] * q.shape[3]


@register_flop_formula(torch.ops.torchtitan.segment_attention, get_raw=True)
def _forward_flops(q, k, v, q_seg, k_seg, q_row, k_row, causal, *_, **__):
    return _flops(q, k, q_seg, k_seg, q_row, k_row, causal)


@register_flop_formula(torch.ops.torchtitan.segment_attention_backward, get_raw=True)
def _backward_flops(grad, q, k, v, out, lse, q_seg, k_seg, q_row, k_row, causal, *_, **__):
    return 5 * _flops(q, k, q_seg, k_seg, q_row, k_row, causal) // 2
