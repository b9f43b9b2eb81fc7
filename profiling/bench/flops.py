"""Counts the matrix products of a call, including those inside the project's own ops, which torch's counter misses."""

from collections.abc import Callable
from typing import Any

import torch
from slotkernels import invariant_slot_attention, slot_attention
from slotkernels.invariant_slot_attention.op import GRID
from slotkernels.sinkhorn import flops as sinkhorn_flops
from torch.utils.flop_counter import FlopCounterMode


def _attention_backward(*shapes: Any, **_: Any) -> int:
    q, k = shapes[3:5]  # after the gradients of three results
    needs, attention, _backend = shapes[-3:]
    kind = "tokens" if needs[1] or needs[2] else "queries"
    return slot_attention.flops(q[0], q[1], k[1], q[2], backward=kind, kept=attention is not None)


def _invariant_backward(*shapes: Any, **_: Any) -> int:
    q, _bias, k = shapes[5:8]  # after the gradients of five results
    needs = shapes[-2]
    return invariant_slot_attention.flops(q[0], q[1], k[1], q[2], backward=True, learned_grid=needs[GRID])


OPS = torch.ops.slotkernels
FLOPS = {
    OPS.inverted_attention: lambda q, k, *_, **__: slot_attention.flops(q[0], q[1], k[1], q[2]),
    OPS.inverted_attention_backward: _attention_backward,
    OPS.invariant_attention: lambda q, _, k, *__, **___: invariant_slot_attention.flops(q[0], q[1], k[1], q[2]),
    OPS.invariant_attention_backward: _invariant_backward,
    OPS.sinkhorn: lambda x, y, *_, **__: sinkhorn_flops(x[0], x[1], y[1], y[2], kept=(True, False)),
}


def count_flops(run: Callable[[], object]) -> int:
    """Operations of the matrix products and of the project's own ops in one call."""
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        run()
    return counter.get_total_flops()
