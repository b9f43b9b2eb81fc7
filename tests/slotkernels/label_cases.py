"""Inputs of the ops that make label maps, the backends that they are tested on, and a check of their statistics."""

import importlib.util

import pytest
import slotkernels._native
import torch

needs_cpp = pytest.mark.skipif(
    slotkernels._native.why_not_loaded("_C") is not None, reason="slotkernels._C is not built"
)
CPP = pytest.param("cpp", "cpu", marks=needs_cpp, id="cpp")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TRITON = pytest.param("triton", "cpu", marks=needs_triton, id="triton")
BACKENDS = [pytest.param("reference", "cpu", id="reference"), CPP, TRITON]
ON_GPU = [pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda") for name in ("reference", "triton")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(case, dtype=torch.float32, device="cpu", contrast=2.0):
    batch, frames, (h, w), slots, objects, _ = case
    image = (contrast * torch.randn(batch, frames, h * w, slots, dtype=torch.float64)).softmax(-1)
    video = (contrast * torch.randn(batch, frames, slots, objects, dtype=torch.float64)).softmax(-1)
    return image.to(device, dtype), video.to(device, dtype)


def assert_exact_statistics(maps):
    labels, areas, boxes = maps.labels, maps.areas, maps.boxes
    objects = areas.shape[2]
    assert areas.dtype == boxes.dtype == torch.int32
    assert boxes.shape == (*labels.shape[:2], objects, 4)
    for b, t in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape[:2])).tolist():
        for k in range(objects):
            rows, columns = torch.nonzero(labels[b, t] == k, as_tuple=True)
            assert areas[b, t, k] == len(rows)
            x0y0x1y1 = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
            assert boxes[b, t, k].tolist() == [int(side) for side in x0y0x1y1]
