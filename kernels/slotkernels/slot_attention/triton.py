"""Launches the Triton kernels of inverted attention; block sizes come from ``tiles.py``."""

from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import INTERPRETED, device_of, launch
from . import tiles
from .kernels import backward_kernel, forward_kernel, reduce_kernel
from .op import Arguments, BackwardArguments, Gradients, Results

REDUCE_BLOCK = 256
SMALL_TILE = 1024  # size of accumulators that need few registers


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Plan:
    """Sizes, strides, block sizes and the grid of a launch, forward or backward."""

    def __init__(self, arguments: Arguments, kind: str) -> None:
        q, k, v, bias, mask, *_ = arguments
        self.q, self.k = _rows(q), _rows(k)
        self.v = self.k if v is None else _rows(v)
        self.batch, self.slots, self.dim = q.shape
        self.tokens, self.value_dim = self.v.shape[1:]
        self.shared, self.groups = v is None, arguments.groups
        self.bias = self.q if bias is None else bias.contiguous()
        self.mask = self.q if mask is None else mask.contiguous().view(torch.uint8)
        self.masks = 0 if mask is None else 1 if mask.shape[1] == 1 else 2
        capability, processors = device_of(q)
        members = self.slots // self.groups
        itemsize = q.element_size()
        self.tile = tile = tiles.tile(
            members, self.groups, self.dim, self.value_dim, self.shared, itemsize, capability, kind
        )
        count = tile.value_chunks if kind == "forward" else tile.chunks
        slices = -(-count // tile.slice_chunks)
        token_bytes = (self.dim + (0 if self.shared else self.value_dim)) * itemsize
        width = self.value_dim if kind == "forward" else self.dim
        programs = self.batch * slices
        self.splits = tiles.splits(programs, self.tokens, tile.block_m, token_bytes, 4 * self.slots * width, processors)
        per_split = -(-self.tokens // (self.splits * tile.block_m)) * tile.block_m
        self.splits = -(-self.tokens // per_split)
        self.grid = (self.batch * self.splits * slices,)
        self.strides = (
            *self.q.stride()[:2], *self.k.stride()[:2], *self.v.stride()[:2],
            *((0, 0) if mask is None else (mask.shape[1] * self.tokens, self.tokens)),
        )  # fmt: skip
        division = (self.batch, self.splits, slices, self.tokens, per_split)
        self.sizes = (*division, members, self.groups, self.dim, self.value_dim)
        self.has_bias = bias is not None
        self.constants = _constants(self, arguments.precision, kind)

    def reduce(
        self, partial: Tensor, result: Tensor, totals: Tensor, total: Tensor, total_eps: float, divide: bool
    ) -> None:
        """Add the splits' fp32 sums into ``result`` [B, N, width]."""
        rows, width = self.batch * self.slots, result.shape[-1]
        grid = (rows, triton.cdiv(width, REDUCE_BLOCK))
        sizes = (self.splits, rows, width)
        arguments = (partial, totals, result, total, total_eps, *sizes)
        launch(reduce_kernel, grid, *arguments, DIVIDE=divide, BLOCK=REDUCE_BLOCK, num_warps=4)


def _register_limit(tile: tiles.Tile, kind: str, dim: int, single: bool) -> int | None:
    """Limit of registers per thread, or None. With no limit the assembler may spill to fit more programs at a time."""
    columns = tile.block_g * tile.block_p
    if kind == "tokens" and single:
        return 208 if tile.block_g == 1 else 224  # masks of groups need a few more
    if kind == "queries" and tile.keep and columns * dim <= SMALL_TILE:
        return 128
    return 255 if kind == "forward" and not tile.keep and not single and columns == 64 else None


def _constants(plan: _Plan, precision: str, kind: str) -> dict[str, Any]:
    """Compile-time arguments that both kernels take, with the launch options."""
    tile, dim, value_dim = plan.tile, plan.dim, plan.value_dim
    if INTERPRETED:
        precision = "interpreted"
    elif plan.q.dtype != torch.float32:
        precision = "ieee"  # has no effect on 16-bit operands
    # The last slice may reach past the width: then the width is not "even".
    share, value_share = (1, tile.slice_chunks) if kind == "forward" else (tile.slice_chunks, 1)
    limit = _register_limit(tile, kind, dim, plan.q.dtype == torch.float32)
    return ({} if limit is None else {"maxnreg": limit}) | {
        "BLOCK_M": tile.block_m, "BLOCK_G": tile.block_g, "BLOCK_P": tile.block_p,
        "BLOCK_D": tile.block_d, "CHUNKS": tile.chunks, "BLOCK_DV": tile.block_dv,
        "EVEN_D": dim % (tile.block_d * share) == 0, "EVEN_DV": value_dim % (tile.block_dv * value_share) == 0,
        "KEEP": tile.keep, "PRECISION": precision, "HAS_BIAS": plan.has_bias, "MASKS": plan.masks,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def inverted_attention(arguments: Arguments) -> Results:
    """As in ``reference.py``; the sums of both products are fp32."""
    q = arguments.q
    plan = _Plan(arguments, "forward")
    batch, slots, value_dim = plan.batch, plan.slots, plan.value_dim
    updates = q.new_empty(batch, slots, value_dim)
    total = q.new_empty(batch, slots, dtype=torch.float32)
    attention = q.new_empty((batch, slots, plan.tokens) if arguments.return_attention else (0,), dtype=torch.float32)
    if batch == 0:
        return Results(updates, total, attention)
    last = plan.splits == 1
    partial, totals = updates, total
    if not last:
        partial = q.new_empty(plan.splits, batch, slots, value_dim, dtype=torch.float32)
        totals = q.new_empty(plan.splits, batch, slots, dtype=torch.float32)
    launch(
        forward_kernel, plan.grid,
        plan.q, plan.k, plan.v, plan.bias, plan.mask, partial, totals, attention,
        *plan.strides, arguments.scale, arguments.weight_eps, arguments.total_eps, *plan.sizes,
        VALUE_CHUNKS=plan.tile.slice_chunks, WRITE_ATTENTION=arguments.return_attention, LAST=last,
        **plan.constants,
    )  # fmt: skip
    if not last:
        plan.reduce(partial, updates, totals, total, arguments.total_eps, divide=True)
    return Results(updates, total, attention)


def inverted_attention_backward(arguments: BackwardArguments) -> Gradients:
    """As in ``reference.py``."""
    (grad_updates, grad_total, grad_attention), forward, updates, total, needs, _ = arguments
    q, k, v, *_ = forward
    need_q, need_k, need_v, need_bias, _ = needs
    need_tokens = need_k or need_v
    grad_q, grad_k = q.new_empty(q.shape if need_q else 0), k.new_empty(k.shape if need_k else 0)
    grad_v = q.new_empty(v.shape if need_v and v is not None else 0)
    grad_bias = total.new_empty(total.shape if need_bias else 0)
    if q.shape[0] == 0:
        return Gradients(grad_q, grad_k, grad_v, grad_bias)
    grad_updates = torch.zeros_like(updates) if grad_updates is None else grad_updates.contiguous()
    updates = updates.contiguous()
    grad_total = None if grad_total is None else grad_total.contiguous()
    grad_attention = None if grad_attention is None else grad_attention.contiguous()

    def run(plan: _Plan, sums: bool, tokens: bool) -> None:
        alone = plan.tile.keep and not tokens  # then the kernel has enough registers to compute ``inner``
        inner = total if alone else (grad_updates.float() * updates).sum(-1)
        # Sums over all tokens are results, in their dtype. Sums over a share of the tokens are fp32 and added later.
        whole = plan.splits == 1 and alone
        partial, partial_bias = grad_q, grad_bias
        if sums and not (whole and need_q):
            partial = q.new_empty((plan.splits, *q.shape), dtype=torch.float32)
        if sums and not (whole and need_bias):
            partial_bias = q.new_empty((plan.splits, *total.shape), dtype=torch.float32)
        launch(
            backward_kernel, plan.grid,
            plan.q, plan.k, plan.v, plan.bias, plan.mask, total, inner, updates, grad_updates,
            total if grad_total is None else grad_total,
            total if grad_attention is None else grad_attention,
            partial, partial_bias, grad_k, grad_v,
            *plan.strides, forward.scale, forward.weight_eps, *plan.sizes,
            SLICE_CHUNKS=plan.tile.slice_chunks, VALUE_CHUNKS=plan.tile.value_chunks, SHARED=plan.shared,
            HAS_GRAD_TOTAL=grad_total is not None, HAS_GRAD_ATTENTION=grad_attention is not None,
            NEED_Q=sums, NEED_K=tokens and need_k, NEED_V=tokens and need_v, **plan.constants,
        )  # fmt: skip
        if sums and need_q and not whole:
            plan.reduce(partial, grad_q, partial_bias, partial_bias, 0.0, divide=False)
        if sums and need_bias and not whole:
            torch.sum(partial_bias, 0, out=grad_bias)

    need_sums = need_q or need_bias
    both = _Plan(forward, "both")
    if need_sums and need_tokens and both.tile.keep:
        run(both, sums=True, tokens=True)
        return Gradients(grad_q, grad_k, grad_v, grad_bias)
    # Accumulators and operands of both kinds do not fit at once, so the tokens are read twice.
    if need_sums:
        run(_Plan(forward, "queries"), sums=True, tokens=False)
    tile = both.tile
    if need_k and v is None and q.dtype == torch.float32 and tile.block_g * tile.block_p > 64:
        # The operands of both parts of the gradient do not fit in registers at once.
        apart = arguments._replace(forward=forward._replace(v=k), needs=[False, True, True, False, False])
        parts = inverted_attention_backward(apart)
        return Gradients(grad_q, parts.k.add_(parts.v), grad_v, grad_bias)
    if need_tokens:
        run(_Plan(forward, "tokens"), sums=False, tokens=True)
    return Gradients(grad_q, grad_k, grad_v, grad_bias)
