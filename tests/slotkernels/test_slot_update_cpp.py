"""The C++ kernels of the slot update: odd sizes, threads, levels of the CPU, and which calls they support."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from slotkernels.slot_update.op import ADD_NORM, GRU_NORM, AddNormArguments, GruNormArguments

from .label_cases import needs_cpp
from .slot_update_cases import OPS, TOLERANCE, both_ops, check, make, run

pytestmark = needs_cpp

# Rows and D: one of all, partial vectors, more rows than a block of sums, more blocks than the maximum.
SHAPES = [(1, 1), (7, 1), (1, 5), (7, 128), (75, 17), (2, 1027), (2100, 6)]
CALLS = {"gru_norm": (GRU_NORM, GruNormArguments), "add_norm": (ADD_NORM, AddNormArguments)}
# Rows of one or six values: their deviation may be small, and its reciprocal multiplies every error.
FEW_VALUES = 1e-4


@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_ops
def test_ragged_sizes_equal_the_float64_oracle(op, shape, gates):
    inputs, cotangents = make(op, *shape, gates)
    check(op, inputs, cotangents, "cpp", max(FEW_VALUES, TOLERANCE[gates]) if shape[1] < 7 else None)


@both_ops
def test_results_do_not_depend_on_the_number_of_threads(op):
    inputs, cotangents = make(op, 2100, 64, torch.float32)
    function = partial(OPS[op][0], backend="cpp")
    one = run(function, inputs, cotangents)
    torch.set_num_threads(2)  # conftest sets it back
    assert all(map(torch.equal, one, run(function, inputs, cotangents)))


@both_ops
def test_a_row_of_nan_spoils_no_other(op):
    inputs, cotangents = make(op, 40, 21, torch.float32)
    function = partial(OPS[op][0], backend="cpp")
    clean = run(function, inputs, cotangents)
    spoilt = [t.detach().clone() for t in inputs]
    spoilt[0][3] = torch.nan
    results = run(function, [t.requires_grad_() for t in spoilt], cotangents)
    others = torch.arange(40) != 3
    assert results[0][3].isnan().all()
    for one, other in zip(clean[:-2], results[:-2], strict=True):  # the last are sums over rows
        assert torch.equal(one[others], other[others])


@both_ops
def test_serves_what_is_not_float64_on_a_cpu(op):
    table, arguments = CALLS[op]
    for gates, state in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.half, torch.bfloat16)):
        inputs, _ = make(op, 3, 8, gates, state=state)
        assert table.select("auto", arguments(*inputs, 1e-5)) == "cpp"
    inputs, _ = make(op, 3, 8, torch.float64)
    assert table.select("auto", arguments(*inputs, 1e-5)) == "reference"
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot serve this call: float64 tensors"):
        OPS[op][0](*inputs, backend="cpp")


@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level):
    """All other tests run the best level that this CPU has."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "oracle or nan"]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)
