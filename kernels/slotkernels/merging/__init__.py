"""Merging of slots that describe one object: complete-linkage clustering (as in SOLV), then mean and sum."""

import math

import torch
from torch import Tensor

from .._checks import check_tensor, check_that
from .._dispatch import Call, Op, requested_backend

__all__ = ["bytes_moved", "cluster_slots", "flops", "merge_slots"]

CLUSTER_SLOTS = Op("cluster_slots")
CLUSTER_SLOTS.add("reference", "slotkernels.merging.reference")
MERGE_SLOTS = Op("merge_slots")
MERGE_SLOTS.add("reference", "slotkernels.merging.reference")


def cluster_slots(
    slots: Tensor, threshold: float, mask: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Agglomerative clustering of each set of slots: complete linkage, cosine distance.

    Equal, up to the order of labels, to scikit-learn's ``AgglomerativeClustering(n_clusters=None, metric="cosine",
    linkage="complete", distance_threshold=threshold)``. Not differentiable, and without a host sync.

    Args:
        slots: [B, K, D]; float32, float64, bfloat16 or float16.
        threshold: clusters are merged while the farthest pair of members is nearer than this, in [0, 2] to matter.
        mask: [B, K] bool; slots where it is False belong to no cluster.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        labels int64 [B, K], 0..C-1 in the order of each cluster's first member, -1 where masked; and C, int64 [B].

    Raises:
        ValueError: if a shape or dtype is not as above, or the threshold is not finite.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes: dict[str, int] = {}
    check_tensor("cluster_slots", "slots", slots, "B K D", sizes)
    if mask is not None:
        check_tensor("cluster_slots", "mask", mask, "B K", sizes, dtypes=(torch.bool,))
    check_that(math.isfinite(threshold), f"cluster_slots: threshold={threshold}, expected a finite number")
    return _cluster(slots.detach(), float(threshold), mask, requested_backend(backend))


def merge_slots(
    slots: Tensor, attention: Tensor, labels: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the slots of each cluster: the mean of their vectors, the sum of their attention.

    Args:
        slots: [B, K, D].
        attention: [B, M, K], any float dtype.
        labels: int64 [B, K] from :func:`cluster_slots`; slots labelled -1 are dropped.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        slots [B, K, D] and attention [B, M, K], cluster c at index c and zeros after the last cluster, and valid [B, K]
        bool. Shapes do not depend on the data. Differentiable once in slots and attention.

    Raises:
        ValueError: if shapes or dtypes disagree.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes: dict[str, int] = {}
    check_tensor("merge_slots", "slots", slots, "B K D", sizes)
    check_tensor("merge_slots", "attention", attention, "B M K", sizes)
    check_tensor("merge_slots", "labels", labels, "B K", sizes, dtypes=(torch.int64,))
    return _merge(slots, attention, labels, requested_backend(backend))


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4) -> int:
    """Least traffic of clustering and merging: slots and attention read and written once, labels written."""
    return 2 * batch * slots * (dim + tokens) * itemsize + 8 * batch * slots


def flops(batch: int, slots: int, tokens: int, dim: int) -> int:
    """Operations: the distance matrix, K - 1 scans of it, and one addition for each number merged."""
    return batch * (2 * slots**2 * dim + (slots - 1) * slots**2 + slots * (dim + tokens))


@torch.library.custom_op("slotkernels::cluster_slots", mutates_args=())
def _cluster(slots: Tensor, threshold: float, mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return CLUSTER_SLOTS.run(backend, Call((slots, mask)), "cluster_slots", slots, threshold, mask)


@_cluster.register_fake
def _(slots, threshold, mask, backend):
    batch, count, _ = slots.shape
    return slots.new_empty(batch, count, dtype=torch.int64), slots.new_empty(batch, dtype=torch.int64)


@torch.library.custom_op("slotkernels::merge_slots", mutates_args=())
def _merge(slots: Tensor, attention: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return MERGE_SLOTS.run(backend, Call((slots, attention, labels)), "merge_slots", slots, attention, labels)


@_merge.register_fake
def _(slots, attention, labels, backend):
    return (
        slots.new_empty(slots.shape),
        attention.new_empty(attention.shape),
        labels.new_empty(labels.shape, dtype=torch.bool),
    )


@torch.library.custom_op("slotkernels::merge_slots_backward", mutates_args=())
def _merge_backward(
    grad_slots: Tensor | None,
    grad_attention: Tensor | None,
    labels: Tensor,
    slots: Tensor,
    attention: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    args = (grad_slots, grad_attention, labels, slots, attention)
    return MERGE_SLOTS.run(backend, Call((slots, attention, labels)), "merge_slots_backward", *args)


@_merge_backward.register_fake
def _(grad_slots, grad_attention, labels, slots, attention, backend):
    return slots.new_empty(slots.shape), attention.new_empty(attention.shape)


def _setup_context(ctx, inputs, output):
    slots, attention, labels, ctx.backend = inputs
    ctx.save_for_backward(labels, slots, attention)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_slots, grad_attention, _):
    return *_merge_backward(grad_slots, grad_attention, *ctx.saved_tensors, backend=ctx.backend), None, None


_merge.register_autograd(_autograd, setup_context=_setup_context)
