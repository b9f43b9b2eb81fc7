"""``cluster_slots`` finds slots that describe the same object; ``merge_slots`` joins them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_choice, check_number, check_tensor
from .._native import why_not_cpp, why_not_cuda
from .._op import Op, Saved

LINKAGES = ("complete", "average", "single")
MOST_SLOTS_ON_CUDA = 256  # one block of threads clusters a set


class ClusterArguments(NamedTuple):
    """Arguments of ``cluster_slots``. Of threshold and n_clusters, the unused one has a value that stops no merge."""

    slots: Tensor  # [B, K, D]
    threshold: float  # merge while the distance is less; infinite for no threshold
    mask: Tensor | None  # [B, K] bool
    n_clusters: int  # merge until this many are left; 1 for no limit
    linkage: str
    min_clusters: int


class Clusters(NamedTuple):
    """Results of ``cluster_slots``."""

    labels: Tensor  # int64 [B, K]
    counts: Tensor  # int64 [B]


class MergeArguments(NamedTuple):
    """Arguments of ``merge_slots``."""

    slots: Tensor  # [B, K, D]
    attention: Tensor  # [B, M, K]
    labels: Tensor  # int64 [B, K]


class Merged(NamedTuple):
    """Results of ``merge_slots``: cluster c is at index c."""

    slots: Tensor  # [B, K, D]
    attention: Tensor  # [B, M, K]
    valid: Tensor  # bool [B, K]


class MergeGradients(NamedTuple):
    """Gradients of the arguments of ``merge_slots``."""

    slots: Tensor  # [B, K, D]
    attention: Tensor  # [B, M, K]


class MergeBackwardArguments(NamedTuple):
    """Arguments of the backward pass of ``merge_slots``; only shapes and dtypes of the inputs are read."""

    grad_slots: Tensor | None  # [B, K, D]
    grad_attention: Tensor | None  # [B, M, K]
    forward: MergeArguments


def _check_merge(arguments: MergeArguments) -> None:
    sizes: dict[str, int] = {}
    check_tensor("merge_slots", "slots", arguments.slots, "B K D", sizes)
    check_tensor("merge_slots", "attention", arguments.attention, "B M K", sizes)
    check_tensor("merge_slots", "labels", arguments.labels, "B K", sizes, dtypes=(torch.int64,))


def _why_not_cuda(arguments: ClusterArguments) -> str | None:
    reason, count = why_not_cuda(arguments), arguments.slots.shape[1]
    return reason or (f"{count} slots, at most {MOST_SLOTS_ON_CUDA}" if count > MOST_SLOTS_ON_CUDA else None)


def _empty_clusters(arguments: ClusterArguments) -> Clusters:
    batch, count, _ = arguments.slots.shape
    new = arguments.slots.new_empty
    return Clusters(new(batch, count, dtype=torch.int64), new(batch, dtype=torch.int64))


def _empty_merged(arguments: MergeArguments) -> Merged:
    slots, attention, labels = arguments
    valid = labels.new_empty(labels.shape, dtype=torch.bool)
    return Merged(slots.new_empty(slots.shape), attention.new_empty(attention.shape), valid)


def _empty_gradients(arguments: MergeBackwardArguments) -> MergeGradients:
    slots, attention, _ = arguments.forward
    return MergeGradients(slots.new_empty(slots.shape), attention.new_empty(attention.shape))


CLUSTER_SLOTS = Op("cluster_slots", _empty_clusters)
CLUSTER_SLOTS.add("cuda", "slotkernels.merging.cuda", supports=_why_not_cuda)
CLUSTER_SLOTS.add("cpp", "slotkernels.merging.cpp", supports=why_not_cpp)
CLUSTER_SLOTS.add("reference", "slotkernels.merging.reference")
MERGE_SLOTS = Op("merge_slots", _empty_merged, check=_check_merge)
MERGE_SLOTS.add("reference", "slotkernels.merging.reference")
MERGE_SLOTS_BACKWARD = MERGE_SLOTS.backward_op(_empty_gradients)


@MERGE_SLOTS.differentiable(constant=("valid",))
def _gradients(saved: Saved[MergeArguments, Merged], *grads: Tensor | None) -> MergeGradients:
    arguments = MergeBackwardArguments(grads[0], grads[1], saved.arguments)
    return MERGE_SLOTS_BACKWARD.apply(arguments, saved.backend, saved.chosen)


def cluster_slots(
    slots: Tensor,  # [B, K, D]
    threshold: float | None = None,
    mask: Tensor | None = None,  # [B, K]
    *,
    n_clusters: int | None = None,
    linkage: str = "complete",
    min_clusters: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Find slots that describe the same object: agglomerative clustering under the cosine distance, as in SOLV.

    The result equals scikit-learn's ``AgglomerativeClustering(n_clusters, metric="cosine", linkage=linkage,
    distance_threshold=threshold)``, for all sets at once. There is no gradient. Shapes are static and the GPU is never
    waited for, so a CUDA graph can contain the call.

    Ties are decided as in SciPy's ``linkage``, which scikit-learn calls. Complete and average linkage follow chains of
    nearest neighbours from the slot with the lowest index. Among equal neighbours they prefer the previous cluster of
    the chain, then the lowest index. Single linkage grows a tree from the first slot. Merges of equal height count in
    the order in which they are found.

    Distances are float64. If the products of two slots are exact (small integers, one-hot slots), distances have the
    same bits as SciPy's. Otherwise they differ from SciPy's by at most (4 D + 16) 2^-53, and the clusters can differ
    only if a distance is that close to the threshold or to another distance. For example, the distance of equal slots
    is 0 or a rounding error, so ``n_clusters`` may merge any of several equal pairs first.

    A slot of zeros is at distance 1 from all others (scikit-learn refuses it). A slot with an infinity or NaN is never
    merged, even if ``n_clusters`` requires it.

    Args:
        slots: [B, K, D]; float32, float64, bfloat16 or float16.
        threshold: clusters are merged while their distance is less than this; distances are in [0, 2].
        mask: [B, K] bool, False for slots to ignore.
        n_clusters: clusters are merged until this many are left; pass it instead of ``threshold``. Sets with fewer
            slots do not change.
        linkage: how the distance of two clusters is defined: by their farthest pair ("complete"), the mean over all
            pairs ("average"), or their nearest pair ("single").
        min_clusters: if fewer clusters than this would be left of a set, none of its slots are merged. SOLV:
            ``min_clusters=3``.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        labels, int64 [B, K]: 0..C-1, numbered in the order of the first members, -1 for masked slots. And the number
        of clusters C, int64 [B].

    Raises:
        ValueError: if a shape or dtype is not as above, if not exactly one of ``threshold`` (finite) and ``n_clusters``
            (at least 1) is passed, if the linkage is unknown, or if ``min_clusters`` is not in 1..``n_clusters``.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> slots = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]]])  # the first and the last are similar
        >>> labels, counts = slotkernels.cluster_slots(slots, threshold=0.15)
        >>> labels, counts
        (tensor([[0, 1, 0]]), tensor([2]))
    """
    sizes: dict[str, int] = {}
    check_tensor("cluster_slots", "slots", slots, "B K D", sizes)
    if mask is not None:
        check_tensor("cluster_slots", "mask", mask, "B K", sizes, dtypes=(torch.bool,))
    if (threshold is None) == (n_clusters is None):
        given = f"threshold={threshold}, n_clusters={n_clusters}"
        raise ValueError(f"cluster_slots: {given}, expected exactly one of them")
    finite = threshold is None or -math.inf < threshold < math.inf
    check_number(finite, "cluster_slots", "threshold", threshold, "a finite number")
    check_number(n_clusters is None or n_clusters >= 1, "cluster_slots", "n_clusters", n_clusters, "at least 1")
    check_choice("cluster_slots", "linkage", linkage, LINKAGES)
    check_number(min_clusters >= 1, "cluster_slots", "min_clusters", min_clusters, "at least 1")
    if n_clusters is not None and min_clusters > n_clusters:
        raise ValueError(f"cluster_slots: min_clusters={min_clusters}, expected at most n_clusters={n_clusters}")
    limit = math.inf if threshold is None else float(threshold)
    arguments = ClusterArguments(slots.detach(), limit, mask, n_clusters or 1, linkage, min_clusters)
    return CLUSTER_SLOTS(arguments, backend)


def merge_slots(
    slots: Tensor,  # [B, K, D]
    attention: Tensor,  # [B, M, K]
    labels: Tensor,  # [B, K]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the slots of each cluster: the mean of their vectors, the sum of their attention.

    Args:
        slots: [B, K, D].
        attention: [B, M, K], any float dtype.
        labels: int64 [B, K] from :func:`cluster_slots`. Slots with label -1 are dropped, whatever they contain.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        slots [B, K, D], attention [B, M, K] and valid [B, K] bool. Cluster c is at index c. Entries after the last
        cluster are zero, and ``valid`` is False there. Differentiable in slots and attention.

    Raises:
        ValueError: if shapes or dtypes disagree.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> slots = torch.tensor([[[1.0, 0.0], [0.0, 4.0], [3.0, 0.0]]])
        >>> attention = torch.tensor([[[0.5, 0.3, 0.2]]])  # for one token
        >>> merged, summed, valid = slotkernels.merge_slots(slots, attention, torch.tensor([[0, 1, 0]]))
        >>> merged[0].tolist(), valid.tolist()
        ([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]], [[True, True, False]])
        >>> summed
        tensor([[[0.7000, 0.3000, 0.0000]]])
    """
    return MERGE_SLOTS(MergeArguments(slots, attention, labels), backend)


def bytes_moved(batch: int, slots: int, tokens: int, dim: int, itemsize: int = 4) -> int:
    """Least memory traffic of both: slots and attention are read and written once, labels are written."""
    return 2 * batch * slots * (dim + tokens) * itemsize + 8 * batch * slots


def flops(batch: int, slots: int, tokens: int, dim: int) -> int:
    """Operations: products of all pairs, 3 K searches of a row of distances, one addition for each number merged."""
    return batch * (slots * (slots + 1) * dim + 3 * slots**2 + slots * (dim + tokens))
