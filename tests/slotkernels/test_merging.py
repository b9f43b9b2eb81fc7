"""Clustering against scikit-learn, for every backend; test_merge_slots.py tests the merging of the clusters."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import AgglomerativeClustering
from slotkernels import cluster_slots
from slotkernels._native import why_not_loaded
from slotkernels.merging import bytes_moved, flops
from slotkernels.merging.reference import _cosine_distances

needs_cpp = pytest.mark.skipif(why_not_loaded("_C") is not None, reason=str(why_not_loaded("_C")))
_why_not_cuda = torch.cuda.is_available() and (why_not_loaded("_C") or why_not_loaded("_C_cuda"))
needs_cuda = pytest.mark.skipif(bool(_why_not_cuda), reason=str(_why_not_cuda))
BACKENDS = [
    "reference",
    pytest.param("cpp", marks=needs_cpp),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]),
]
LINKAGES = ["complete", "average", "single"]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_every_linkage = pytest.mark.parametrize("linkage", LINKAGES)


def cluster(slots, threshold=None, mask=None, *, backend, **options):
    """The op on the backend's device, its results on the CPU."""
    device = "cuda" if backend == "cuda" else "cpu"
    slots, mask = torch.as_tensor(slots).to(device), None if mask is None else torch.as_tensor(mask).to(device)
    labels, counts = cluster_slots(slots, threshold, mask, backend=backend, **options)
    assert labels.dtype == counts.dtype == torch.int64
    return labels.cpu(), counts.cpu()


def in_order_of_first_member(labels):
    seen: dict[int, int] = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


def oracle(slots, threshold=None, n_clusters=None, linkage="complete"):
    """Scikit-learn's labels of one set, which needs at least two slots, and no more clusters than slots."""
    if len(slots) <= max(1, n_clusters or 1):
        return list(range(len(slots)))
    model = AgglomerativeClustering(n_clusters, metric="cosine", linkage=linkage, distance_threshold=threshold)
    with warnings.catch_warnings():  # about the whole tree, and about slots that look like distances
        warnings.simplefilter("ignore")
        return in_order_of_first_member(model.fit_predict(np.asarray(slots)))


def assert_as_scikit_learn(slots, mask=None, *, backend, linkage, **rule):
    """Labels and counts of a batch, set by set; masked slots are left out of scikit-learn's."""
    labels, counts = cluster(slots, mask=mask, backend=backend, linkage=linkage, **rule)
    for row in range(len(slots)):
        present = np.ones(len(slots[row]), bool) if mask is None else mask[row]
        expected = oracle(slots[row][present], linkage=linkage, **rule)
        assert labels[row].numpy()[present].tolist() == expected, (slots[row].tolist(), rule, linkage)
        assert (labels[row].numpy()[~present] == -1).all()
        assert counts[row].item() == len(set(expected))


@st.composite
def rules(draw, most):
    if draw(st.booleans()):
        return {"threshold": draw(st.sampled_from([0.0, 0.05, 0.15, 0.25, 0.5, 0.9, 1.0, 1.4, 2.1]))}
    return {"n_clusters": draw(st.integers(1, most + 2))}


@on_every_backend
@settings(max_examples=60)
@given(st.integers(1, 12).flatmap(lambda k: st.tuples(st.just(k), rules(k))), st.integers(2, 9), st.data())
def test_clusters_equal_scikit_learn(backend, problem, dim, data):
    (count, rule), linkage = problem, data.draw(st.sampled_from(LINKAGES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    slots = rng.normal(size=(3, count, dim)).astype(np.float32)
    mask = rng.random((3, count)) > 0.3 if data.draw(st.booleans()) else None
    assert_as_scikit_learn(slots, mask, backend=backend, linkage=linkage, **rule)


@on_every_backend
@settings(max_examples=80)
@given(st.integers(2, 14).flatmap(lambda k: st.tuples(st.just(k), rules(k))), st.integers(1, 6), st.data())
def test_ties_equal_scikit_learn(backend, problem, dim, data):
    """Small integers: products are exact, so equal distances are equal to the last bit, in any order of summation."""
    (count, rule), linkage = problem, data.draw(st.sampled_from(LINKAGES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    slots = rng.integers(-data.draw(st.integers(0, 2)), 3, size=(2, count, dim)).astype(np.float32)
    slots[~slots.any(2)] = 1
    mask = rng.random((2, count)) > 0.3 if data.draw(st.booleans()) else None
    assert_as_scikit_learn(slots, mask, backend=backend, linkage=linkage, **rule)


@on_every_backend
@with_every_linkage
@pytest.mark.parametrize("n_clusters", [1, 2, 3, 7, 11])
def test_slots_all_equally_far_or_all_equal(backend, linkage, n_clusters):
    axes = np.eye(12, dtype=np.float32)
    for slots in (axes, axes[:1].repeat(12, 0), axes[[0, 1, 1, 2, 0, 3, 3, 3, 4, 0, 2, 5]]):
        assert_as_scikit_learn(slots[None], backend=backend, linkage=linkage, n_clusters=n_clusters)
        assert_as_scikit_learn(slots[None], backend=backend, linkage=linkage, threshold=1.0)


@on_every_backend
def test_ties_follow_chains_of_nearest_neighbours(backend):
    # Slots 0 and 3 are equal and merge first; 1 is then as far from them as from 2. By first members (0, 1) would be
    # next, but their union stands at index 3: a chain that starts at 1 finds 2 before it.
    slots = torch.tensor([[[1, 1, 0], [1, 1, 1], [1, 0, 1], [1, 1, 0]]]).float()
    assert oracle(slots[0], n_clusters=2) == [0, 1, 1, 0]
    assert cluster(slots, n_clusters=2, backend=backend)[0].tolist() == [[0, 1, 1, 0]]


@on_every_backend
@with_every_linkage
def test_equal_slots_off_the_grid_share_a_cluster(backend, linkage):
    objects = np.random.default_rng(0).normal(size=(40, 6, 96)).astype(np.float32)
    which = np.random.default_rng(1).integers(0, 6, size=(40, 15))
    slots = np.take_along_axis(objects, which[..., None], 1)
    assert_as_scikit_learn(slots, backend=backend, linkage=linkage, threshold=0.15)
    assert_as_scikit_learn(slots, backend=backend, linkage=linkage, threshold=0.9)


@on_every_backend
@pytest.mark.parametrize("dim", [3, 64, 767])
def test_threshold_is_met_to_a_millionth_millionth(backend, dim):
    slots = torch.randn(2, dim) + 2
    distance = pdist(slots.double().numpy(), "cosine").item()
    assert cluster(slots[None], distance + 1e-12, backend=backend)[1].item() == 1
    assert cluster(slots[None], distance - 1e-12, backend=backend)[1].item() == 2


@pytest.mark.parametrize("dim", [1, 5, 64, 768])
def test_distances_are_within_the_documented_bound_of_scipy(dim):
    slots = torch.randn(4, 20, dim) + 1
    for problem, distances in zip(slots, _cosine_distances(slots, None), strict=True):
        expected = torch.from_numpy(squareform(pdist(problem.double().numpy(), "cosine")))
        assert distances.isinf().equal(torch.eye(20, dtype=torch.bool))
        assert (distances.fill_diagonal_(0.0) - expected).abs().max() <= (4 * dim + 16) * 2**-53


@on_every_backend
@with_every_linkage
@pytest.mark.parametrize("count", [1, 2, 8, 20, 32, 33, 100, 256])
def test_every_size(backend, linkage, count):
    objects = np.random.default_rng(count).normal(size=(2, count // 3 + 1, 70))
    which = np.random.default_rng(1).integers(0, count // 3 + 1, size=(2, count))
    noise = np.random.default_rng(2).normal(size=(2, count, 70))
    slots = (np.take_along_axis(objects, which[..., None], 1) + 0.3 * noise).astype(np.float32)
    mask = np.random.default_rng(3).random((2, count)) > 0.2
    assert_as_scikit_learn(slots, backend=backend, linkage=linkage, threshold=0.15)
    assert_as_scikit_learn(slots, mask, backend=backend, linkage=linkage, n_clusters=max(1, count // 4))


@needs_cpp
def test_more_slots_than_a_block_holds_on_two_threads():
    torch.set_num_threads(2)
    assert_as_scikit_learn(torch.randn(3, 300, 64).numpy(), backend="cpp", linkage="average", n_clusters=17)
    slots = torch.randn(50, 20, 768)
    together, _ = cluster(slots, 0.95, backend="cpp")
    assert torch.equal(together, torch.cat([cluster(row[None], 0.95, backend="cpp")[0] for row in slots]))


@on_every_backend
def test_linkage_is_the_farthest_mean_or_nearest_pair(backend):
    angles = torch.tensor([0.0, 0.5, 1.0])  # neighbours are at 1 - cos(0.5) = 0.122, the ends at 1 - cos(1) = 0.460
    slots = torch.stack((angles.cos(), angles.sin()), 1).unsqueeze(0)
    for linkage, height in (("complete", 0.4597), ("average", (0.1224 + 0.4597) / 2), ("single", 0.1224)):
        for threshold, count in ((height - 1e-3, 2 if linkage != "single" else 3), (height + 1e-3, 1)):
            assert cluster(slots, threshold, linkage=linkage, backend=backend)[1].item() == count


@on_every_backend
def test_problems_of_a_batch_do_not_wait_for_each_other(backend):
    slots = torch.randn(1, 6, 4)
    alike = slots[:, :1].expand(1, 6, 4)
    labels, counts = cluster(torch.cat((slots, alike, slots)), 0.4, backend=backend)
    assert counts.tolist() == [counts[0].item(), 1, counts[0].item()]
    assert torch.equal(labels[0], labels[2])
    assert (labels[1] == 0).all()


@on_every_backend
@with_every_linkage
def test_too_few_clusters_cancel_the_merge(backend, linkage):
    axes = torch.eye(4)
    slots = torch.stack((axes[[0, 0, 1, 1, 1]], axes[[0, 0, 1, 2, 2]], axes[[0, 1, 2, 3, 3]]))
    mask = torch.tensor([[True] * 5, [True] * 5, [True, False, False, True, True]])
    rule = {"linkage": linkage, "backend": backend}
    assert cluster(slots, 0.15, mask, **rule)[1].tolist() == [2, 3, 2]
    labels, counts = cluster(slots, 0.15, mask, min_clusters=3, **rule)
    assert labels.tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 2], [0, -1, -1, 1, 2]]
    assert counts.tolist() == [5, 3, 3]


@on_every_backend
@with_every_linkage
def test_zero_vectors_are_at_distance_one(backend, linkage):
    slots = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    assert cluster(slots, 0.99, linkage=linkage, backend=backend)[0].tolist() == [[0, 1, 2]]
    assert cluster(slots, 1.01, linkage=linkage, backend=backend)[1].item() == 1


@on_every_backend
@with_every_linkage
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_slots_that_are_not_finite_never_merge(backend, linkage, value):
    slots = torch.randn(2, 7, 5)
    clean = slots.clone()
    slots[0, 0, 0] = slots[0, 4, 3] = slots[0, 5] = value
    finite = torch.tensor([[False, True, True, True, False, False, True], [True] * 7])
    for rule in ({"threshold": 1.2}, {"n_clusters": 1}):
        labels, counts = cluster(slots, linkage=linkage, backend=backend, **rule)
        expected, fewer = cluster(clean, mask=finite, linkage=linkage, backend=backend, **rule)
        assert counts.tolist() == [fewer[0].item() + 3, fewer[1].item()]
        for row in range(2):
            assert in_order_of_first_member(labels[row][finite[row]]) == expected[row][finite[row]].tolist()
    labels, counts = cluster(slots, 1.2, finite, linkage=linkage, backend=backend)
    expected, fewer = cluster(clean, 1.2, finite, linkage=linkage, backend=backend)
    assert torch.equal(labels, expected)
    assert torch.equal(counts, fewer)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_strided_and_empty_input(backend, dtype):
    slots = torch.randn(5, 4, 16).to(dtype).transpose(0, 1)[..., ::2]
    mask = (torch.rand(5, 4) > 0.3).T
    expected = [oracle(row[present].double().numpy(), 0.8) for row, present in zip(slots, mask, strict=True)]
    labels, _ = cluster(slots, 0.8, mask, backend=backend)
    assert [row[present].tolist() for row, present in zip(labels, mask, strict=True)] == expected
    labels, counts = cluster(slots[:0], 0.8, backend=backend)
    assert labels.shape == (0, 5)
    assert counts.shape == (0,)
    assert cluster(slots, 0.8, torch.zeros(4, 5, dtype=torch.bool), backend=backend)[1].tolist() == [0] * 4


def test_float64_is_served_by_the_reference():
    slots = torch.randn(2, 5, 3, dtype=torch.float64)
    assert cluster(slots, 0.5, backend="auto")[0].tolist() == [oracle(row.numpy(), 0.5) for row in slots]
    with pytest.raises(RuntimeError, match="float64"):
        cluster_slots(slots, 0.5, backend="cpp")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend):
    mask = torch.tensor([[True, False, True, True, True]]).repeat(2, 1)
    op = torch.ops.slotkernels.cluster_slots
    for linkage in LINKAGES:
        torch.library.opcheck(op, (torch.randn(2, 5, 3), 0.3, mask, 1, linkage, 1, backend))
    torch.library.opcheck(op, (torch.randn(2, 5, 3), math.inf, None, 2, "complete", 2, backend))


def test_compiles_fullgraph_and_takes_no_part_in_gradients():
    slots = torch.randn(2, 6, 3, requires_grad=True)

    def both(slots):
        return *cluster_slots(slots, 0.6), *cluster_slots(slots, n_clusters=3, linkage="average")

    expected = both(slots)
    actual = torch.compile(both, fullgraph=True, backend="aot_eager")(slots)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 8, 20, 32, 33, 100, 256])
def test_a_captured_graph_clusters_what_it_is_given(count):
    slots, mask = torch.randn(4, count, 96, device="cuda"), torch.rand(4, count, device="cuda") > 0.2
    cluster_slots(slots, 0.9, mask, backend="cuda")  # loads the library
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        labels, counts = cluster_slots(slots, 0.9, mask, backend="cuda")
    for _ in range(3):
        slots.copy_(torch.randn_like(slots))
        graph.replay()
        expected = cluster_slots(slots, 0.9, mask, backend="reference")
        assert torch.equal(labels, expected[0])
        assert torch.equal(counts, expected[1])


@needs_cuda
@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    slots = torch.randn(4, 40, 96, device="cuda")
    cluster_slots(slots, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for backend in ("cuda", "reference"):
            for linkage in LINKAGES:
                cluster_slots(slots, 0.9, linkage=linkage, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.gpu
def test_a_gpu_takes_at_most_256_slots():
    with pytest.raises(RuntimeError, match="257 slots, at most 256"):
        cluster_slots(torch.randn(1, 257, 8, device="cuda"), 0.5, backend="cuda")
    slots = torch.randn(1, 257, 8, device="cuda")
    assert torch.equal(cluster_slots(slots, 0.5)[0].cpu(), cluster_slots(slots.cpu(), 0.5)[0])


SLOTS = torch.zeros(1, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3, 4), 0.1), {}, r"slots is float32 \[3, 4\], expected \[B, K, D\]"),
        ((torch.zeros(1, 0, 4), 0.1), {}, "with K > 0"),
        ((SLOTS, 0.1, torch.ones(1, 3)), {}, "mask is .*expected dtype bool"),
        ((SLOTS, 0.1, torch.ones(1, 4).bool()), {}, "mask is .*with K = 3"),
        ((SLOTS, math.nan), {}, "threshold=nan, expected a finite number"),
        ((SLOTS, math.inf), {}, "threshold=inf"),
        ((SLOTS,), {}, "threshold=None, n_clusters=None, expected exactly one"),
        ((SLOTS, 0.1), {"n_clusters": 2}, "threshold=0.1, n_clusters=2, expected exactly one"),
        ((SLOTS,), {"n_clusters": 0}, "n_clusters=0, expected at least 1"),
        ((SLOTS, 0.1), {"linkage": "ward"}, "linkage='ward', expected one of complete, average, single"),
        ((SLOTS, 0.1), {"min_clusters": 0}, "min_clusters=0, expected at least 1"),
        ((SLOTS,), {"n_clusters": 2, "min_clusters": 3}, "min_clusters=3, expected at most n_clusters=2"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        cluster_slots(*arguments, **options)


def test_cost_formulas():
    assert bytes_moved(1, 2, 3, 4) == 2 * 2 * 7 * 4 + 16
    assert flops(1, 2, 3, 4) == 2 * 3 * 4 + 12 + 14
