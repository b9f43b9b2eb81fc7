"""Unpack on a GPU machine what profiling.gpu.carry prepared: missing packages and the compiled ops.

    python -m profiling.gpu.unpack .carry/figures .gpu-check/site
    python -m profiling.gpu.unpack .carry/proof .gpu-check/site

Packages that the machine already has are not unpacked, and existing compiled ops are kept. This command uses only the
standard library.
"""

import shutil
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from profiling.common.paths import ROOT


def installed(name: str) -> str | None:
    """Version of a package that this Python has; None if it has none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of missing packages into ``site``; returns a line for each."""
    lines = []
    for wheel in sorted(folder.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        existing = installed(name)
        if existing is None:
            with zipfile.ZipFile(wheel) as archive:  # which writes nothing outside the folder
                archive.extractall(site)
        lines.append(f"{name}: {f'the machine has {existing}' if existing else f'unpacked {version}'}")
    return lines


def main() -> None:
    """The command."""
    carried, site = map(Path, sys.argv[1:3])
    if not carried.is_dir():
        print(f"{carried} does not exist, so only packages of this machine are used (make gpu-carry creates it)")
        return
    shutil.rmtree(site, ignore_errors=True)  # what an earlier call unpacked
    site.mkdir(parents=True)
    for line in unpack_wheels(carried, site):
        print(line)
    for library in sorted(carried.glob("*.so")):
        target = ROOT / "kernels" / "slotkernels" / library.name
        if target.exists():
            print(f"{library.name}: kernels/slotkernels already has it")
        else:
            shutil.copy2(library, target)
            print(f"{library.name}: copied to kernels/slotkernels")


if __name__ == "__main__":
    main()
