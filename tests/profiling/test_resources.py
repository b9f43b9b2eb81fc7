"""Resources of the shipped kernels are those pinned in profiling/results/resources*.csv, for each Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from profiling.gpu import cubin
from profiling.gpu import resource_tables as tables

ROOT = Path(__file__).parents[2]
UPDATE = "run `python -m profiling.compilers --all --update`, look at the difference and commit it"


@pytest.fixture(scope="module")
def table():
    return tables.read()


@pytest.mark.parametrize("version", tables.VERSIONS)
def test_tables_were_made_from_these_kernels(version):
    stamp, rows = tables.read(tables.table_of(version))
    assert stamp == tables.stamp(version), f"kernels or launches changed: {UPDATE}"
    assert {row.sm for row in rows} == ({80, 90, 100} if version == tables.PINNED else {90})


@pytest.mark.parametrize("version", tables.VERSIONS)
def test_no_shipped_launch_spills_or_outgrows_shared_memory(version):
    rows = tables.read(tables.table_of(version))[1]
    faults = {f"sm_{row.sm} {row.launch}": tables.faults(row) for row in rows}
    assert not {name: reasons for name, reasons in faults.items() if reasons}


def test_known_spills_are_still_there(table):
    spills = {row.launch: row.spill_bytes for row in table[1] if row.sm == 100 and row.spill_bytes}
    assert spills == tables.KNOWN_SPILLS, "write the list in profiling/gpu/resource_tables.py anew"


def test_every_triton_compiles_the_same_launches(table):
    # A launch whose compilation failed would be missing.
    pinned = sorted((row.launch, row.kernel) for row in table[1] if row.sm == 90)
    for version in tables.VERSIONS:
        rows = [row for row in tables.read(tables.table_of(version))[1] if row.sm == 90]
        assert sorted((row.launch, row.kernel) for row in rows) == pinned, version


def test_cuda_table_is_of_these_sources_without_faults():
    stamp, rows = tables.read(tables.CUDA_TABLE)
    assert stamp.split(" sources ")[1] == cubin.cuda_hash(), f"csrc/cuda changed: {UPDATE}"
    assert {row.sm for row in rows} == {80, 90, 100}
    assert not [row for row in rows if tables.faults(row)]


@pytest.mark.parametrize(
    ("sm", "warps", "registers", "shared", "expected"),
    [  # from the occupancy calculator of Nsight Compute
        (80, 8, 32, 0, 1.0),
        (80, 8, 33, 0, 0.75),
        (90, 8, 255, 0, 0.125),
        (90, 1, 32, 0, 0.5),  # 32 blocks are the most
        (80, 4, 32, 48 * 1024, 0.1875),  # three blocks of 49 KiB in 164
        (90, 4, 32, 48 * 1024, 0.25),
        (100, 32, 64, 0, 0.5),
    ],
)
def test_occupancy_is_bound_by_registers_shared_memory_or_blocks(sm, warps, registers, shared, expected):
    assert cubin.occupancy(sm, warps, registers, shared) == expected


def test_every_row_has_the_occupancy_of_its_resources(table):
    for row in [*table[1], *tables.read(tables.CUDA_TABLE)[1]]:
        share = cubin.occupancy(row.sm, row.warps, row.registers, row.shared_bytes)
        assert row.occupancy == share, row
        assert share > 0, row


@pytest.mark.parametrize("kernels", [("forward_kernel", "backward_kernel"), ("sinkhorn_kernel", "gradient_kernel")])
def test_products_run_on_tensor_cores(table, kernels):
    rows = [row for row in table[1] if row.kernel in kernels]
    assert {(row.kernel, row.sm) for row in rows} == {(kernel, sm) for kernel in kernels for sm in (80, 90, 100)}
    for row in rows:
        if "ieee" not in row.launch:  # which asks for products without them
            assert row.tensor_core_instructions > 0, row.launch


def test_growth_is_separated_from_other_changes(table):
    old = [table[1][0]._replace(launch=name) for name in ("same", "more", "fewer", "gone")]
    fields = {"registers": old[1].registers + 1, "occupancy": old[1].occupancy / 2, "wide_loads": 0}
    new = [old[0], old[1]._replace(**fields), old[2]._replace(registers=1), old[3]._replace(launch="new")]
    worse, other = tables.differences(old, new)
    before = f"sm_80 more, {old[1].kernel}: "
    assert worse == [
        f"{before}registers {old[1].registers} -> {old[1].registers + 1}",
        f"{before}occupancy {old[1].occupancy} -> {old[1].occupancy / 2}",
    ]
    assert [line.split(",")[0] for line in other] == ["sm_80 more", "sm_80 fewer", "sm_80 new", "sm_80 gone"]
    assert tables.differences(old, old) == ([], [])


def run(*arguments, code="from profiling import resources; resources.main()"):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_kernel_that_grew_fails_the_command(tmp_path, table):
    label = "gru_norm forward D256 bfloat16"
    rows = [row._replace(registers=row.registers - (row.sm == 90)) for row in table[1] if row.launch == label]
    assert len(rows) == 3
    tables.write(tmp_path / "table.csv", table[0], rows)
    code = (
        "import pathlib; from profiling import resources; "
        f"resources.tables.TABLE = pathlib.Path({str(tmp_path / 'table.csv')!r}); resources.main()"
    )
    done = run("--only", label, "--workers", "1", code=code)
    registers = rows[1].registers
    assert f"worse: sm_90 {label}, gru_norm_forward_kernel: registers {registers} -> {registers + 1}" in done.stdout
    assert "1 worse, 0 changed in another way" in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(cubin.nvcc() is None, reason="no nvcc: set CUDA_HOME or install the CUDA toolkit")
def test_recompiled_cuda_sources_give_the_rows_of_the_table():
    stamp, pinned = tables.read(tables.CUDA_TABLE)
    compiler = cubin.nvcc()
    assert compiler is not None
    if stamp.split(" sources")[0] != cubin.cuda_stamp(compiler).split(" sources")[0]:
        pytest.skip(f"the table was made with {stamp.split(' sources')[0]}")
    assert list(cubin.cuda_resources(compiler, 90)) == [row for row in pinned if row.sm == 90]


@pytest.mark.slow
@pytest.mark.parametrize("label", ["inverted_attention forward B128 M864 N32 D768 bfloat16", "gru_norm forward D768"])
def test_recompiled_kernels_give_the_rows_of_the_table(table, label):
    if table[0] != tables.stamp(triton.__version__):
        pytest.skip("the table is of other kernels, or of another Triton")
    printed = run("--only", label, "--workers", "1").stdout.strip()
    expected = [row for row in table[1] if label in row.launch]
    assert [line.split("  ") for line in printed.splitlines()] == [[str(cell) for cell in row] for row in expected]
    assert expected
