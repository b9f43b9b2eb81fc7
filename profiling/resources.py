"""Report registers, spills, shared memory, occupancy and tensor cores of the GPU kernels, without a GPU.

    python -m profiling.resources            # compile all for sm_80, sm_90 and sm_100 and compare; fails on growth
    python -m profiling.resources --update   # write profiling/results/resources.csv and resources-cuda.csv anew
    python -m profiling.resources --only "inverted_attention forward"   # only these rows; with --update, others stay
    python -m profiling.resources --one-of-each --sm 90   # one launch of each kernel and mode; fails on errors, spills

The launches of Triton kernels are recorded by running the ops' launch code on meta tensors, so the compiled kernels
are those that a GPU would run. The figures come from Triton's call of the assembler. The pinned version of Triton has
the table resources.csv; each other version has resources-triton-X.csv, for sm_90. ``python -m profiling.compilers``
runs this command with each version. If nvcc is installed, the CUDA sources of csrc/cuda are compiled with the flags of
setup.py.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import triton

from profiling.gpu import resource_tables as tables
from profiling.gpu.compile_launches import DEVICES, Choice, triton_rows
from profiling.gpu.cubin import Resources, cuda_resources, cuda_stamp, nvcc


def cuda_rows(choice: Choice, compiler: Path) -> Iterator[Resources]:
    """The row of each kernel of csrc/cuda."""
    for sm in choice.architectures:
        yield from (row for row in cuda_resources(compiler, sm) if choice.only in row.launch)


def printed(made: Iterable[Resources | str]) -> tuple[list[Resources], list[str]]:
    """Rows and errors, each printed as soon as it is there."""
    rows, errors = [], []
    for row in made:
        if isinstance(row, str):
            print("error:", row, flush=True)
            errors.append(row)
        else:
            print(*row, *tables.faults(row), sep="  ", flush=True)
            rows.append(row)
    return rows, errors


def arguments_of_command() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the tables instead of comparing with them")
    parser.add_argument("--only", default="", help="only launches whose label contains this text")
    parser.add_argument("--one-of-each", action="store_true", help="one launch of each kernel and mode, not compared")
    parser.add_argument(
        "--sm",
        type=int,
        choices=DEVICES,
        help=f"one architecture (default: all; 90 if Triton is not {tables.PINNED})",
    )
    parser.add_argument("--workers", type=int, default=2, help="compilers that run at the same time (default 2)")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    if arguments.update and arguments.one_of_each:
        parser.error("--update writes tables of all launches, --one-of-each compiles a few: choose one of them")
    return arguments


def main() -> None:
    """The command."""
    arguments = arguments_of_command()
    version = triton.__version__
    is_pinned = version == tables.PINNED
    architectures = (arguments.sm,) if arguments.sm else tuple(DEVICES) if is_pinned else (90,)
    choice = Choice(arguments.only, architectures, arguments.one_of_each)
    made: list[tuple[Path, str, Iterable[Resources | str]]] = [
        (tables.table_of(version), tables.stamp(version), triton_rows(choice, arguments.workers))
    ]
    compiler = nvcc()
    if is_pinned and not arguments.one_of_each:
        if compiler is None:
            print("no nvcc on the path, in CUDA_HOME or in /usr/local/cuda: csrc/cuda is left out")
        else:
            made.append((tables.CUDA_TABLE, cuda_stamp(compiler), cuda_rows(choice, compiler)))
    bad = 0
    worse: list[str] = []
    other: list[str] = []
    for table, stamp, results in made:
        rows, errors = printed(results)
        bad += len(errors) + sum(bool(tables.faults(row)) for row in rows)
        if arguments.one_of_each:
            continue
        pinned = tables.read(table)[1] if table.exists() else []
        chosen = [row for row in pinned if arguments.only in row.launch and row.sm in architectures]
        for lines, new in zip((worse, other), tables.differences(chosen, rows), strict=True):
            lines += new
        if arguments.update and rows and not errors:
            tables.write(table, stamp, [row for row in pinned if row not in chosen] + rows)
    print(*(f"worse: {line}" for line in worse), *(f"changed: {line}" for line in other), sep="\n")
    if bad:
        raise SystemExit(f"{bad} launches do not compile, spill or do not fit")
    if (worse or other) and not arguments.update:
        raise SystemExit(
            f"{len(worse)} worse, {len(other)} changed in another way: check the lines above, then run with --update"
        )


if __name__ == "__main__":
    main()
