"""Check that the C++ sources use only what the headers of the oldest supported PyTorch declare.

    python -m profiling.oldest_torch

Newer headers declare more, so a build with them does not show the error. The headers are read from the wheel on the
package index (20 of its 500 MB are downloaded), and each source is parsed with them. The headers of ATen are left out,
because the stable ABI does not use them.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from profiling.common.paths import ROOT
from profiling.gpu.cubin import setup_script

CHUNK = 8 << 20  # bytes of one request


class RemoteFile(io.RawIOBase):
    """A file on a server that supports requests for parts of a file."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """The new position."""
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """How many bytes were read into the buffer."""
        last = min(self.position + len(buffer), self.size) - 1
        if last < self.position:
            return 0
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={self.position}-{last}"})
        with urllib.request.urlopen(request) as answer:
            if answer.status != 206:
                raise OSError(f"{self.url}: the server does not support requests for parts of a file")
            read = answer.read()
        buffer[: len(read)] = read
        self.position += len(read)
        return len(read)


def oldest() -> str:
    """The oldest version that pyproject.toml allows."""
    requirements = tomllib.loads((ROOT / "kernels/pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = (match[1] for line in requirements if (match := re.fullmatch(r"torch>=([\d.]+)", line)))
    return version


def url_of(version: str) -> str:
    """Where the package index of pip's configuration has the wheel for this machine."""
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options, f"torch=={version}"]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(report)["install"][0]["download_info"]["url"]


def extract_headers(wheel: zipfile.ZipFile, folder: Path) -> Path:
    """The folder of headers to include."""
    names = [name for name in wheel.namelist() if re.match(r"torch/include/(?!ATen/)", name)]
    wheel.extractall(folder, names)
    return folder / "torch/include"


def parse(source: Path, include: Path, flags: list[str]) -> str:
    """The errors of a source that is parsed with these headers; empty if there are none."""
    folders = ["-isystem", str(include), "-isystem", sysconfig.get_paths()["include"]]
    command = [os.environ.get("CXX", "c++"), *flags, "-fsyntax-only", *folders, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--include", type=Path, help="torch/include of an installed PyTorch, in place of the wheel's")
    options = parser.parse_args()
    sources = [ROOT / "csrc/schemas.cpp", *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        include = options.include
        if include is None:
            wheel = io.BufferedReader(RemoteFile(url_of(oldest())), CHUNK)
            include = extract_headers(zipfile.ZipFile(wheel), Path(folder))
        flags = setup_script()["CXX_FLAGS"]
        errors = list(filter(None, threads.map(lambda source: parse(source, include, flags), sources)))
    if errors:
        sys.exit("\n".join([*errors, f"error: {len(errors)} sources do not fit PyTorch {oldest()}"]))
    print(f"{len(sources)} sources fit PyTorch {oldest()}")


if __name__ == "__main__":
    main()
