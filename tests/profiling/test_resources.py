"""What shipped kernels ask of a GPU is pinned in profiling/results/resources.csv."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from profiling import resources

ROOT = Path(__file__).parents[2]
UPDATE = "run `python -m profiling.resources --update`, look at the difference and commit it"


@pytest.fixture(scope="module")
def table():
    return resources.read()


def test_table_was_made_from_these_kernels(table):
    if f"triton {resources.triton.__version__} " not in table[0]:
        pytest.skip(f"the table was made with {table[0].split(' sources')[0]}")
    assert table[0] == resources.sources_hash(), f"kernels or launches changed: {UPDATE}"


def test_no_shipped_launch_spills_or_outgrows_shared_memory(table):
    faults = {f"sm_{row.sm} {row.launch}": resources.faults(row) for row in table[1]}
    assert not {name: found for name, found in faults.items() if found}


@pytest.mark.parametrize("kernels", [("forward_kernel", "backward_kernel"), ("sinkhorn_kernel", "gradient_kernel")])
def test_products_run_on_tensor_cores(table, kernels):
    rows = [row for row in table[1] if row.kernel in kernels]
    assert {(row.kernel, row.sm) for row in rows} == {(kernel, sm) for kernel in kernels for sm in (80, 90, 100)}
    for row in rows:
        if "ieee" not in row.launch:  # which asks for products without them
            assert row.tensor_core_instructions > 0, row.launch


@pytest.mark.slow
@pytest.mark.parametrize("label", ["inverted_attention forward B128 M864 N32 D768 bfloat16", "gru_norm forward D768"])
def test_compiling_again_gives_the_rows_of_the_table(table, label):
    if table[0] != resources.sources_hash():
        pytest.skip("the table is of other kernels")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "profiling.resources", "--only", label, "--workers", "1"]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    expected = [row for row in table[1] if label in row.launch]
    assert [line.split("  ") for line in printed.splitlines()] == [[str(cell) for cell in row] for row in expected]
    assert expected
