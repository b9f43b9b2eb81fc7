"""Merging of slots that describe one object: agglomerative clustering (complete linkage in SOLV), then mean and sum."""

import math
from functools import partial

import torch
from torch import Tensor

from .. import _derivatives
from .._checks import check_tensor, check_that
from .._dispatch import Call, Op, requested_backend
from .._native import why_not_cpp, why_not_cuda
from . import reference

__all__ = ["bytes_moved", "cluster_slots", "flops", "merge_slots"]

LINKAGES = ("complete", "average", "single")
MOST_SLOTS_ON_CUDA = 256  # one block a problem


def _why_not_cuda(call: Call) -> str | None:
    reason, count = why_not_cuda(call), call.options["slots"]
    return reason or (f"{count} slots, at most {MOST_SLOTS_ON_CUDA}" if count > MOST_SLOTS_ON_CUDA else None)


CLUSTER_SLOTS = Op("cluster_slots")
CLUSTER_SLOTS.add("cuda", "slotkernels.merging.cuda", supports=_why_not_cuda)
CLUSTER_SLOTS.add("cpp", "slotkernels.merging.cpp", supports=why_not_cpp)
CLUSTER_SLOTS.add("reference", "slotkernels.merging.reference")
MERGE_SLOTS = Op("merge_slots")
MERGE_SLOTS.add("reference", "slotkernels.merging.reference")


def cluster_slots(
    slots: Tensor,
    threshold: float | None = None,
    mask: Tensor | None = None,
    *,
    n_clusters: int | None = None,
    linkage: str = "complete",
    min_clusters: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Agglomerative clustering of each set of slots under the cosine distance, as SOLV merges its slots.

    The partitions of scikit-learn's ``AgglomerativeClustering(n_clusters, metric="cosine", linkage=linkage,
    distance_threshold=threshold)``, for all sets at once. Not differentiable, without a host sync, and of static
    shapes, so it can be captured in a CUDA graph.

    Ties are broken as SciPy's ``linkage`` does, which scikit-learn calls: complete and average linkage follow chains of
    nearest neighbours from the slot of the lowest index, prefer the previous cluster of the chain, then the lowest
    index; single linkage grows a tree from the first slot; merges of equal height count in the order they are found.
    Distances are computed in float64. Where the products of two slots are exact (small integers, one-hot slots) they
    are SciPy's to the last bit; else they differ from SciPy's by at most (4 D + 16) 2^-53, and the partition can differ
    only where a distance is that near to the threshold or to another distance. Equal slots on no such grid are of this
    kind: their distances are 0 or rounding, so which of several equal pairs ``n_clusters`` merges first is chance.

    Args:
        slots: [B, K, D]; float32, float64, bfloat16 or float16.
        threshold: clusters are merged while their distance is less than this, in [0, 2] to matter.
        mask: [B, K] bool; slots where it is False are as if absent.
        n_clusters: clusters are merged until so many are left, instead of ``threshold``. Sets with fewer slots than
            this stay as they are.
        linkage: the distance of two clusters is that of their farthest pair ("complete"), the mean over all pairs
            ("average") or that of their nearest pair ("single").
        min_clusters: a set of which fewer clusters would be left keeps all its slots apart instead. SOLV cancels what
            leaves at most two: ``min_clusters=3``.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    A slot of zeros is at distance 1 from every other (scikit-learn refuses it). One with an infinity or a NaN is at an
    infinite distance and never merges, even where ``n_clusters`` asks for it.

    Returns:
        labels int64 [B, K], 0..C-1 in the order of each cluster's first member, -1 where masked; and C, int64 [B].

    Raises:
        ValueError: if a shape or dtype is not as above, unless exactly one of ``threshold`` (finite) and ``n_clusters``
            (at least 1) is given, if the linkage is unknown, or if ``min_clusters`` is not in 1..``n_clusters``.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes: dict[str, int] = {}
    check_tensor("cluster_slots", "slots", slots, "B K D", sizes)
    if mask is not None:
        check_tensor("cluster_slots", "mask", mask, "B K", sizes, dtypes=(torch.bool,))
    given = f"cluster_slots: threshold={threshold}, n_clusters={n_clusters}"
    check_that((threshold is None) != (n_clusters is None), f"{given}, expected exactly one of them")
    check_that(threshold is None or math.isfinite(threshold), f"{given}, expected a finite number")
    check_that(n_clusters is None or n_clusters >= 1, f"{given}, expected at least 1")
    check_that(linkage in LINKAGES, f"cluster_slots: linkage={linkage!r}, expected one of {', '.join(LINKAGES)}")
    most = "" if n_clusters is None else f" and at most n_clusters={n_clusters}"
    check_that(
        min_clusters >= 1 and (n_clusters is None or min_clusters <= n_clusters),
        f"cluster_slots: min_clusters={min_clusters}, expected at least 1{most}",
    )
    limit = math.inf if threshold is None else float(threshold)
    return _cluster(slots.detach(), limit, mask, n_clusters or 1, linkage, min_clusters, requested_backend(backend))


def merge_slots(
    slots: Tensor, attention: Tensor, labels: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the slots of each cluster: the mean of their vectors, the sum of their attention.

    Args:
        slots: [B, K, D].
        attention: [B, M, K], any float dtype.
        labels: int64 [B, K] from :func:`cluster_slots`; slots labelled -1 are dropped, whatever they hold.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        slots [B, K, D] and attention [B, M, K], cluster c at index c and zeros after the last cluster, and valid [B, K]
        bool. Shapes do not depend on the data. Differentiable in slots and attention.

    Raises:
        ValueError: if shapes or dtypes disagree.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    sizes: dict[str, int] = {}
    check_tensor("merge_slots", "slots", slots, "B K D", sizes)
    check_tensor("merge_slots", "attention", attention, "B M K", sizes)
    check_tensor("merge_slots", "labels", labels, "B K", sizes, dtypes=(torch.int64,))
    backend = requested_backend(backend)
    if _derivatives.takes_composite("merge_slots", backend):
        return _derivatives.composite(reference.merge_slots, slots, attention, labels)
    return _merge(slots, attention, labels, backend)


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4) -> int:
    """Least traffic of clustering and merging: slots and attention read and written once, labels written."""
    return 2 * batch * slots * (dim + tokens) * itemsize + 8 * batch * slots


def flops(batch: int, slots: int, tokens: int, dim: int) -> int:
    """Operations: products of all pairs, 3 K searches of a row of distances, one addition for each number merged."""
    return batch * (slots * (slots + 1) * dim + 3 * slots**2 + slots * (dim + tokens))


@torch.library.custom_op("slotkernels::cluster_slots", mutates_args=())
def _cluster(
    slots: Tensor,
    threshold: float,
    mask: Tensor | None,
    n_clusters: int,
    linkage: str,
    min_clusters: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    call = Call((slots, mask), {"slots": slots.shape[1]})
    rule = (threshold, mask, n_clusters, linkage, min_clusters)
    return CLUSTER_SLOTS.run(backend, call, "cluster_slots", slots, *rule)


@_cluster.register_fake
def _(slots, threshold, mask, n_clusters, linkage, min_clusters, backend):
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


_derivatives.differentiable_once(_merge_backward, "merge_slots")


def _setup_context(ctx, inputs, output):
    slots, attention, labels, ctx.backend = inputs
    ctx.save_for_backward(labels, slots, attention)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_slots, grad_attention, _):
    labels, *tensors = ctx.saved_tensors
    if _derivatives.differentiates_again(ctx.backend, (grad_slots, grad_attention)):
        function, needs = partial(reference.merge_slots, labels=labels), ctx.needs_input_grad[:2]
        return *_derivatives.composite_gradients(function, tensors, needs, (grad_slots, grad_attention)), None, None
    return *_merge_backward(grad_slots, grad_attention, labels, *tensors, ctx.backend), None, None


_merge.register_autograd(_autograd, setup_context=_setup_context)
