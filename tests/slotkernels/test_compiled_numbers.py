"""An op is compiled again for another number. The number is then symbolic, and a check must not format it."""

import pytest
import slotkernels
import torch

X, Y = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
ATTENTION = torch.eye(2).expand(1, 1, 2, 2)
GUIDE = torch.arange(48, dtype=torch.uint8).view(1, 1, 2, 8, 3)
SLOT_ATTENTION = slotkernels.SlotAttention(3, 8)
FLOATS, INTEGERS = (0.1, 0.2, 0.35), (1, 2, 3)


def guided(**setting):
    return slotkernels.guided_labels(ATTENTION, ATTENTION, (1, 2), GUIDE, **setting)


def slots(**setting):
    return SLOT_ATTENTION(X, torch.ones(2, 3, 8), **setting).slots


def manhattan(x, y):
    return (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(3)


CALLS = {
    "cluster_slots threshold": (FLOATS, lambda n: slotkernels.cluster_slots(X, n)),
    "cluster_slots n_clusters": (INTEGERS, lambda n: slotkernels.cluster_slots(X, n_clusters=n)),
    "cluster_slots min_clusters": (INTEGERS, lambda n: slotkernels.cluster_slots(X, 0.5, min_clusters=n)),
    "sinkhorn_divergence blur": (FLOATS, lambda n: slotkernels.sinkhorn_divergence(X, Y, blur=n)),
    "sinkhorn_divergence scaling": (FLOATS, lambda n: slotkernels.sinkhorn_divergence(X, Y, scaling=n)),
    "sinkhorn_divergence diameter": (FLOATS, lambda n: slotkernels.sinkhorn_divergence(X, Y, diameter=n)),
    "SamplesLoss blur": (FLOATS, lambda n: slotkernels.SamplesLoss(blur=n)(X, Y)),
    "SamplesLoss blur, a cost": (FLOATS, lambda n: slotkernels.SamplesLoss(cost=manhattan, blur=n)(X, Y)),
    "SamplesLoss blur, a kernel": (FLOATS, lambda n: slotkernels.SamplesLoss("laplacian", blur=n)(X, Y)),
    "transport_targets eps": (FLOATS, lambda n: slotkernels.transport_targets(X, Y, Y, eps=n)[0]),
    "transport_targets iterations": (INTEGERS, lambda n: slotkernels.transport_targets(X, Y, Y, iterations=n)[0]),
    "sinkhorn_plan eps": (FLOATS, lambda n: slotkernels.sinkhorn_plan(x=X, y=Y, eps=n)),
    "sinkhorn_plan tolerance": (FLOATS, lambda n: slotkernels.sinkhorn_plan(x=X, y=Y, eps=0.1, tolerance=n)),
    "sinkhorn_plan iterations": (INTEGERS, lambda n: slotkernels.sinkhorn_plan(x=X, y=Y, eps=0.1, iterations=n)),
    "guided_labels epsilon": (FLOATS, lambda n: guided(epsilon=n)),
    "guided_labels radius": (INTEGERS, lambda n: guided(radius=n)),
    "guided_labels subsample": (INTEGERS, lambda n: guided(subsample=n)),
    "inverted_attention eps": (FLOATS, lambda n: slotkernels.inverted_attention(X, Y, eps=n)),
    "SlotAttention sharpness": (FLOATS, lambda n: slots(sharpness=n)),
    "SlotAttention iterations": (INTEGERS, lambda n: slots(iterations=n)),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_again_with_another_number(name):
    numbers, call = CALLS[name]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with torch.no_grad():
        for number in numbers:
            torch.testing.assert_close(compiled(number), call(number))
