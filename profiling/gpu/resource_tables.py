"""The committed tables of the GPU kernels' resources: which exist, reading, writing and comparing them."""

import csv
import hashlib
from pathlib import Path

from profiling.common.paths import RESULTS, ROOT
from profiling.gpu.cubin import SHARED_LIMIT, Resources

# Versions of Triton that users have, oldest first: with torch 2.11 (our GPU machine), with torch 2.13 (which
# constraints.txt installs), and the newest.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
PINNED = "3.7.1"
TABLE = RESULTS / "resources.csv"
CUDA_TABLE = TABLE.with_name("resources-cuda.csv")
# Launches that are known to spill, and the bytes: on a B200 with Triton 3.7.1 (3.9.0 spills nothing there). No other
# launch may spill.
KNOWN_SPILLS = {
    "sinkhorn backward B3456 N32 M32 D768 bfloat16 p2 batch": 12,
    "sinkhorn forward B1024 N64 M64 D256 float32 tf32x3 p1 problem both weights": 88,
    "sinkhorn forward B512 N128 M128 D256 float32 tf32x3 p1 problem both weights": 16,
    "sinkhorn forward B512 N128 M128 D256 float32 ieee p2 problem both weights": 160,
    "sinkhorn forward B512 N128 M128 D256 bfloat16 p1 100.0 both": 8,
}
# What may not get worse, and which way is worse.
WORSE = {"registers": 1, "spill_bytes": 1, "shared_bytes": 1, "occupancy": -1, "tensor_core_instructions": -1}


def table_of(version: str) -> Path:
    """The table of a version of Triton."""
    return TABLE if version == PINNED else TABLE.with_name(f"resources-triton-{version}.csv")


def stamp(version: str) -> str:
    """The first line of the table of a version of Triton: the version, and a hash of all files that rows depend on."""
    root = ROOT / "kernels" / "slotkernels"
    digest = hashlib.sha256(Path(__file__).with_name("shipped.py").read_bytes())
    for path in [root / "_triton.py", *sorted(root.rglob("*/*.py"))]:
        text = path.read_bytes()
        if path.name not in ("reference.py", "module.py", "__init__.py") and (
            b"import triton" in text or path.name == "tiles.py"
        ):
            digest.update(text)
    return f"triton {version} sources {digest.hexdigest()[:16]}"


def read(table: Path = TABLE) -> tuple[str, list[Resources]]:
    """A committed table: its compiler and the hash of its sources, and its rows."""
    with table.open() as file:
        first = next(file).removeprefix("# ").strip()
        rows = list(csv.reader(file))[1:]
    kinds = Resources.__annotations__.values()
    return first, [Resources(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in rows]


def write(table: Path, first: str, rows: list[Resources]) -> None:
    """Write a table."""
    with table.open("w", newline="") as file:
        file.write(f"# {first}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(rows)


def faults(row: Resources) -> list[str]:
    """The faults of a launch: register spills, and more shared memory than a block may use."""
    known = KNOWN_SPILLS.get(row.launch, 0) if row.sm == 100 else 0
    reasons = [f"{row.spill_bytes} bytes are spilled"] if row.spill_bytes > known else []
    if row.shared_bytes > SHARED_LIMIT[row.sm]:
        reasons.append(f"{row.shared_bytes} bytes of shared memory, sm_{row.sm} has {SHARED_LIMIT[row.sm]}")
    return reasons


def _grouped(rows: list[Resources]) -> dict[tuple[str, str, int], list[Resources]]:
    """Rows by launch, kernel and architecture: one call may launch a kernel several times."""
    groups: dict[tuple[str, str, int], list[Resources]] = {}
    for row in rows:
        groups.setdefault((row.launch, row.kernel, row.sm), []).append(row)
    return groups


def differences(pinned: list[Resources], rows: list[Resources]) -> tuple[list[str], list[str]]:
    """Figures that are worse than in the pinned rows, and all other changes."""
    before, now = _grouped(pinned), _grouped(rows)
    worse: list[str] = []
    other: list[str] = []
    for key, current in now.items():
        name = "sm_{2} {0}, {1}".format(*key)
        if len(before.get(key, [])) != len(current):
            other.append(f"{name}: {len(before.get(key, []))} launches are pinned, {len(current)} there")
            continue
        for old, new in zip(before[key], current, strict=True):
            changed = [field for field in Resources._fields if getattr(old, field) != getattr(new, field)]
            for field in changed:
                was, is_now = getattr(old, field), getattr(new, field)
                grew = (is_now - was) * WORSE.get(field, 0) > 0
                (worse if grew else other).append(f"{name}: {field} {was} -> {is_now}")
    other += ["sm_{2} {0}, {1}: pinned, and gone".format(*key) for key in before if key not in now]
    return worse, other
