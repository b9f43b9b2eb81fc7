"""Compile the Triton kernels with each version of Triton that users have, without a GPU, to find errors and spills.

    python -m profiling.compilers                    # one launch of each kernel and mode, for sm_90
    python -m profiling.compilers --all              # all shipped launches, compared with the committed tables
    python -m profiling.compilers --all --update     # also write profiling/results/resources*.csv

Each version in ``profiling.gpu.resource_tables.VERSIONS`` is installed in its own folder ``triton-X`` of the virtual
environment, unless the folder exists. The exit status is 1 if a launch does not compile, spills registers, or needs
more shared memory than a block may have.
"""

import argparse
import os
import subprocess
import sys
import time
from importlib.metadata import version as installed_version
from pathlib import Path

from profiling.common.paths import ROOT
from profiling.gpu.resource_tables import VERSIONS

FAULTS = ("spilled", "shared memory, ", "error:", "worse:", "changed:")


def folder_of(version: str) -> Path | None:
    """Where a version of Triton is installed; None for that of the environment itself."""
    return None if version == installed_version("triton") else Path(sys.prefix) / f"triton-{version}"


def install(version: str) -> Path | None:
    """Install a version of Triton in its folder if it is missing; returns its folder as :func:`folder_of` does."""
    folder = folder_of(version)
    if folder is None or folder.exists():
        return folder
    print(f"triton {version}: installing in {folder}", flush=True)
    unfinished = folder.with_name(folder.name + ".part")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--upgrade",
    ]
    subprocess.run([*command, "--target", str(unfinished), f"triton=={version}"], check=True)
    unfinished.rename(folder)
    return folder


def environment(folder: Path | None) -> dict[str, str]:
    """Environment of a process that imports the Triton in ``folder``, and this checkout."""
    paths = [*([] if folder is None else [folder]), ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}


def compile_with(version: str, options: list[str]) -> list[str]:
    """Run ``profiling.resources`` with a version of Triton and return the lines that name a fault."""
    variables = environment(install(version))
    print(f"triton {version}: compiling", flush=True)
    begin = time.monotonic()
    command = [sys.executable, "-m", "profiling.resources", *options]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    faults = [line for line in lines if any(word in line for word in FAULTS)] if done.returncode else []
    if done.returncode and not faults:
        faults = [done.stderr.strip()]
    rows = sum("  " in line for line in lines)
    print(f"triton {version}: {rows} launches in {time.monotonic() - begin:.0f} s, {len(faults)} faults", flush=True)
    print(*(f"  {line}" for line in faults), sep="\n", end="\n" if faults else "", flush=True)
    return faults


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="X", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--all", action="store_true", help="all shipped launches, compared with the committed tables")
    parser.add_argument("--update", action="store_true", help="with --all: write the tables")
    parser.add_argument("--workers", type=int, default=2, help="compilers that run at a time (default 2)")
    arguments = parser.parse_args()
    if arguments.update and not arguments.all:
        parser.error("--update writes tables of all launches: add --all")
    options = [] if arguments.all else ["--one-of-each", "--sm", "90"]
    options += ["--update"] * arguments.update + ["--workers", str(arguments.workers)]
    bad = {version: len(faults) for version in arguments.versions if (faults := compile_with(version, options))}
    if bad:
        raise SystemExit("faults with " + ", ".join(f"triton {version}: {count}" for version, count in bad.items()))


if __name__ == "__main__":
    main()
