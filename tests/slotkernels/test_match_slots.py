"""match_slots against SciPy's Hungarian algorithm, and against a loop over all permutations where sums are equal."""

import importlib.util
import os
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from slotkernels import match_slots
from slotkernels.matching import bytes_moved, flops, reference

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton, and TRITON_INTERPRET=1 before its import",
)
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
BACKENDS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("triton", "cpu", id="triton-interpreted", marks=interpreted),
    pytest.param("reference", "cuda", id="reference-cuda", marks=on_gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=on_gpu),
]
all_backends = pytest.mark.parametrize(("backend", "device"), BACKENDS)
COUNTS = [1, 2, 3, 4, 5]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_scipy(similarity):
    problems = similarity.double().cpu().numpy().reshape(-1, *similarity.shape[-2:])
    found = np.stack([linear_sum_assignment(problem, maximize=True)[1] for problem in problems])
    return torch.from_numpy(found).view(similarity.shape[:-1])


def by_loop(similarity):
    """Sums in Python's floats, which are float64; the first permutation of the largest sum."""
    count, partners = similarity.shape[-1], []
    for rows in similarity.double().reshape(-1, count, count).tolist():
        best, largest = tuple(range(count)), float("-inf")
        for columns in permutations(range(count)):
            total = sum(row[column] for row, column in zip(rows, columns, strict=True))
            if total > largest:  # false for a NaN
                best, largest = columns, total
        partners.append(best)
    return torch.tensor(partners).view(similarity.shape[:-1])


def check(similarity, backend, device):
    actual = match_slots(similarity.to(device), backend=backend).cpu()
    assert actual.dtype == torch.int64
    assert torch.equal(actual, by_loop(similarity))


@pytest.mark.parametrize("count", COUNTS)
def test_reference_equals_scipy(count):
    similarity = torch.randn(10_000, count, count)
    assert torch.equal(match_slots(similarity, backend="reference"), by_scipy(similarity))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_backends
def test_every_dtype_equals_a_loop_over_permutations(backend, device, dtype, count):
    check(torch.randn(37, count, count).to(dtype), backend, device)


@pytest.mark.parametrize("count", COUNTS)
@all_backends
def test_first_of_equal_sums_wins(backend, device, count):
    check(torch.randint(-1, 2, (99, count, count)).float(), backend, device)
    equal = match_slots(torch.ones(count, count, device=device), backend=backend)
    assert equal.tolist() == list(range(count))


@pytest.mark.parametrize("count", COUNTS)
def test_float64_is_matched_in_float64(count):
    similarity = 1 + 1e-9 * torch.randn(500, count, count, dtype=torch.float64)
    assert torch.equal(match_slots(similarity), by_scipy(similarity))


@all_backends
def test_sums_are_float64(backend, device):
    similarity = torch.tensor([[1e8, 1e8], [1.0, 0.0]], device=device)  # 1e8 + 1 is 1e8 in float32
    assert match_slots(similarity, backend=backend).tolist() == [1, 0]


@all_backends
def test_sums_with_a_nan_lose_and_infinities_forbid_or_force(backend, device):
    similarity = torch.randn(200, 3, 3)
    spoiled = torch.rand(similarity.shape)
    for value, low in ((torch.nan, 0.0), (torch.inf, 0.2), (-torch.inf, 0.3)):
        similarity[(spoiled > low) & (spoiled < low + 0.1)] = value
    similarity[0] = torch.nan
    similarity[1] = -torch.inf
    similarity[2, 1] = torch.nan
    check(similarity, backend, device)
    assert match_slots(similarity.to(device), backend=backend)[:3].tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 5), (0,), (3, 0)], ids=str)
@all_backends
def test_any_leading_dimensions(backend, device, leading):
    similarity = torch.randn(*leading, 4, 4)
    partners = match_slots(similarity.to(device), backend=backend)
    assert partners.shape == (*leading, 4)
    if partners.numel():
        check(similarity, backend, device)


@all_backends
def test_memory_may_be_in_any_order(backend, device):
    similarity = torch.randn(4, 6, 4, 5).permute(3, 1, 2, 0)[::2, 1:]
    assert not similarity.is_contiguous()
    check(similarity, backend, device)


def test_blocks_of_problems_are_joined(monkeypatch):
    similarity = torch.randn(50, 3, 3)
    monkeypatch.setattr(reference, "BLOCK", 6 * 7)  # seven problems of six permutations
    check(similarity, "reference", "cpu")


def test_partners_gather_similarities_and_their_order_is_the_inverse():
    similarity = torch.randn(20, 4, 4)
    partners = match_slots(similarity)
    pairs = similarity.gather(-1, partners.unsqueeze(-1)).sum((-1, -2))
    expected = [similarity[i, torch.arange(4), partners[i]].sum() for i in range(20)]
    torch.testing.assert_close(pairs, torch.stack(expected))
    assert torch.equal(match_slots(similarity.mT), partners.argsort(-1))


@all_backends
def test_opcheck(backend, device):
    similarity = torch.randn(2, 3, 4, 4, device=device)
    torch.library.opcheck(torch.ops.slotkernels.match_slots, (similarity, backend))


@all_backends
def test_compiles_fullgraph(backend, device):
    similarity = torch.randn(6, 4, 4, device=device, requires_grad=True)

    def mean_of_pairs(similarity):
        partners = match_slots(similarity, backend=backend)
        return similarity.gather(-1, partners.unsqueeze(-1)).mean()

    compiled = torch.compile(mean_of_pairs, fullgraph=True, backend="aot_eager")
    expected, actual = mean_of_pairs(similarity), compiled(similarity)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, similarity) for value in (actual, expected)))


@pytest.mark.parametrize(("backend", "device"), BACKENDS[2:])
def test_replays_in_a_cuda_graph(backend, device):
    similarity = torch.randn(64, 16, 4, 4, device=device)
    match_slots(similarity, backend=backend)  # compiles the kernel, which is not allowed during a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        partners = match_slots(similarity, backend=backend)
    similarity.copy_(torch.randn_like(similarity))
    graph.replay()
    assert torch.equal(partners.cpu(), by_scipy(similarity))


@pytest.mark.parametrize(("dtype", "message"), [(torch.float64, "float64"), (torch.float32, "cpu")], ids=str)
def test_triton_refuses_a_call_with_the_reason(dtype, message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=f"match_slots: backend 'triton' cannot serve this call.*{message}"):
        match_slots(torch.zeros(2, 2, dtype=dtype), backend="triton")


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (torch.zeros(3), r"similarity is float32 \[3\], expected \[\.\.\., P, P\]"),
        (torch.zeros(2, 3, 4), r"similarity is float32 \[2, 3, 4\], expected \[\.\.\., P, P\]"),
        (torch.zeros(3, 3).int(), r"similarity is int32 \[3, 3\], .* of dtype float32, float64, bfloat16 or float16"),
        (torch.zeros(2, 6, 6), r"P=6, expected 1 to 5, .* \(for any P: scipy\.optimize\.linear_sum_assignment\)"),
        (torch.zeros(2, 0, 0), "P=0, expected 1 to 5"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(similarity, message):
    with pytest.raises(ValueError, match=message):
        match_slots(similarity)


def test_cost_formulas():
    assert bytes_moved(10, 4) == 10 * (16 * 4 + 4 * 8)
    assert bytes_moved(10, 4, itemsize=2) == 10 * (16 * 2 + 4 * 8)
    assert flops(10, 4) == 10 * 24 * 4
