"""Calls every compiled CPU op on unusual shapes; test_sanitizers.py runs this with an instrumented library.

Every op of csrc/schemas.cpp has to be called here. Values are checked in other tests.
"""

import re
from pathlib import Path

import torch
from slotkernels import (
    InvariantSlotAttention,
    cluster_slots,
    guided_labels,
    inverted_attention,
    propagate_labels,
    sinkhorn_divergence,
    sinkhorn_plan,
    sinkhorn_potentials,
)
from slotkernels._native import why_not_loaded
from slotkernels.sinkhorn.op import make_problem
from slotkernels.sinkhorn.streaming import STREAMING
from slotkernels.slot_attention.token_norm import TOKEN_NORM, Arguments
from slotkernels.slot_update import add_norm, gru_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def merging() -> None:
    for batch, count, dim in ((0, 4, 3), (1, 1, 1), (3, 8, 5), (2, 33, 17), (5, 20, 128)):
        for linkage in ("complete", "average", "single"):
            for dtype in DTYPES:
                slots, mask = torch.randn(batch, count, dim).to(dtype), torch.rand(batch, count) > 0.2
                cluster_slots(slots, 0.5, mask, linkage=linkage)
                cluster_slots(slots.transpose(0, 1).contiguous().transpose(0, 1), n_clusters=3, linkage=linkage)


def sinkhorn() -> None:
    for batch, rows, columns, dim in ((0, 4, 4, 3), (1, 1, 1, 1), (3, 7, 5, 3), (2, 33, 17, 37), (2, 32, 32, 64)):
        for dtype in DTYPES:
            x, y = (torch.randn(batch, n, dim).to(dtype).requires_grad_() for n in (rows, columns))
            for p in (1, 2):
                for diameter in ("batch", "problem", 8.0):
                    sinkhorn_divergence(x, y, p=p, diameter=diameter).float().sum().backward()
                a, b = torch.rand(batch, rows), torch.rand(batch, columns)
                a, b = a / a.sum(1, keepdim=True), b / b.sum(1, keepdim=True)
                for debias in (True, False):
                    f, g = sinkhorn_potentials(x, y, a, b, p=p, diameter=8.0, debias=debias)
                    (f.float().sum() + g.float().sum()).backward()


def streaming_sinkhorn() -> None:
    for batch, rows, columns, dim in ((0, 4, 4, 3), (1, 1, 1, 1), (2, 193, 17, 37), (1, 32, 400, 64)):
        for p in (1, 2):
            x, y = (torch.randn(batch, n, dim, requires_grad=True) for n in (rows, columns))
            problem = make_problem("exercise", x, y, p=p, blur=0.05, scaling=0.5, diameter=8.0)
            STREAMING.apply(problem, "cpp").value.sum().backward()


def transport_plan() -> None:
    for batch, rows, columns in ((0, 4, 4), (1, 1, 1), (3, 7, 5), (2, 130, 33), (1, 370, 360)):
        for dtype in (*DTYPES, torch.float64):
            cost = torch.rand(batch, rows, columns).to(dtype).requires_grad_()
            weights = torch.rand(batch, rows).softmax(1).to(dtype)
            for tolerance in (None, 1e-3):
                sinkhorn_plan(cost, weights, eps=0.1, iterations=50, tolerance=tolerance).sum().backward()
            sinkhorn_plan(cost.detach() * 50, eps=0.02, iterations=3)


def propagation() -> None:
    for dtype in DTYPES:
        for (height, width), slots, video_slots, size in (((3, 5), 7, 3, (17, 23)), ((1, 1), 1, 1, (3, 2))):
            image = torch.rand(2, 3, height * width, slots).softmax(-1).to(dtype)
            video = torch.rand(2, 3, slots, video_slots).softmax(-1).to(dtype)
            propagate_labels(image, video, (height, width), size)
            for subsample in (1, 4):
                guide = torch.randint(0, 256, (2, 3, *size, 3), dtype=torch.uint8)
                guided_labels(
                    image, video, (height, width), guide, subsample=subsample, confidence=True, statistics=True
                )


def attention() -> None:
    for dtype in DTYPES:
        for batch, tokens, slots, dim in ((0, 4, 3, 5), (1, 1, 1, 1), (2, 67, 5, 37), (2, 40, 33, 64)):
            q, k = (torch.randn(batch, n, dim).to(dtype).requires_grad_() for n in (slots, tokens))
            updates, _ = inverted_attention(q, k, mask=torch.rand(batch, tokens) > 0.2)
            updates.float().sum().backward()
            v = torch.randn(batch, tokens, dim + 3).to(dtype).requires_grad_()
            results = inverted_attention(q, k, v, bias=torch.randn(batch, slots), return_attention=True)
            torch.cat([result.float().flatten() for result in results if result is not None]).sum().backward()


def token_norm() -> None:
    for dtype in DTYPES:
        for shape in ((0, 4, 3), (1, 1, 1), (2, 67, 37), (3, 40, 64)):
            tokens = torch.randn(shape).to(dtype).requires_grad_()
            for result in DTYPES:
                TOKEN_NORM(Arguments(tokens, 1e-5, result))[0].float().sum().backward()


def invariant_attention() -> None:
    for batch, tokens, slots, dim in ((0, 4, 3, 5), (1, 1, 1, 1), (2, 67, 5, 37), (3, 40, 33, 64)):
        for normed in (False, True):
            module = InvariantSlotAttention(slots, dim, iterations=1, encoder_norm=normed)
            grid = torch.rand(tokens, 2, requires_grad=not normed)
            output = module(torch.randn(batch, tokens, dim), grid, mask=torch.rand(batch, tokens) > 0.2)
            torch.cat([result.flatten() for result in output]).sum().backward()


def slot_update() -> None:
    for dtype in DTYPES:
        for state in DTYPES:
            for rows, dim in ((0, 4), (1, 1), (3, 17), (70, 37), (5, 64)):
                first, second, update = (torch.randn(rows, n * dim).to(dtype).requires_grad_() for n in (3, 3, 1))
                slots, weight, bias = (
                    torch.randn(rows, dim).to(state).requires_grad_(),
                    torch.ones(dim),
                    torch.zeros(dim),
                )
                for results in (
                    gru_norm(first, second, slots, weight, bias),
                    add_norm(slots, update, weight, bias),
                ):
                    torch.cat([result.float() for result in results]).sum().backward(retain_graph=True)
                    results[0].float().sum().backward()


def main() -> None:
    torch.manual_seed(0)
    assert why_not_loaded("_C") is None, why_not_loaded("_C")
    parts = (
        merging,
        sinkhorn,
        streaming_sinkhorn,
        transport_plan,
        propagation,
        attention,
        token_norm,
        invariant_attention,
        slot_update,
    )
    for exercise in parts:
        exercise()
    schemas = Path("csrc/schemas.cpp").read_text()
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', schemas))
    compiled = {
        name for path in Path("csrc/cpu").glob("*.cpp") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
    }
    called = set(vars(torch.ops.slotkernels_native))  # an op is looked up there once, when it is first called
    assert compiled <= defined, f"kernels without a schema: {compiled - defined}"
    assert compiled <= called, f"not called here: {compiled - called}"
    print("called:", *sorted(compiled))


if __name__ == "__main__":
    main()
