"""Ops compile again with another number: torch.compile then makes it symbolic, and a check must not format it."""

import pytest
import slotkernels
import torch

X, Y = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
ATTENTION = torch.eye(2).expand(1, 1, 2, 2)
GUIDE = torch.arange(48, dtype=torch.uint8).view(1, 1, 2, 8, 3)
SLOT_ATTENTION = slotkernels.SlotAttention(3, 8)

CALLS = {
    "cluster_slots threshold": lambda number: slotkernels.cluster_slots(X, number),
    "sinkhorn_divergence blur": lambda number: slotkernels.sinkhorn_divergence(X, Y, blur=number),
    "sinkhorn_divergence scaling": lambda number: slotkernels.sinkhorn_divergence(X, Y, scaling=number),
    "sinkhorn_divergence diameter": lambda number: slotkernels.sinkhorn_divergence(X, Y, diameter=number),
    "sinkhorn_plan eps": lambda number: slotkernels.sinkhorn_plan(x=X, y=Y, eps=number),
    "guided_labels epsilon": lambda number: slotkernels.guided_labels(
        ATTENTION, ATTENTION, (1, 2), GUIDE, epsilon=number
    ),
    "SlotAttention sharpness": lambda number: SLOT_ATTENTION(X, torch.ones(2, 3, 8), sharpness=number).slots,
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_again_with_another_number(name):
    call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with torch.no_grad():
        for number in (0.1, 0.2, 0.35):
            torch.testing.assert_close(compiled(number), call(number))
