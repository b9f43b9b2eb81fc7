"""A Triton cache that was made without a GPU is used on another machine and in another folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from profiling.accounting.__main__ import PINNED
from profiling.gpu import warm_cache

ROOT = Path(__file__).parents[2]
UPDATE = "run `python -m profiling.accounting --update`, look at the difference and commit it"
KERNEL = """
import triton
import triton.language as tl


@triton.jit
def add_one(source, target, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=mask) + 1, mask=mask)
"""
MAKE = """
import torch
from pathlib import Path
from profiling.gpu import warm_cache
from profiling.gpu.launched import Pointer
from slotkernels._triton import Launch
from tree import add_one

arguments = (Pointer(torch.float32, 0), Pointer(torch.float32, 4), 48)
launch = Launch(add_one, arguments, {"BLOCK": 64, "num_warps": 2})
errors = warm_cache.make([launch], Path("cache.tar.xz"), Path("full"), 1)
assert errors == [], errors
"""
CHECK = """
import torch
from pathlib import Path
from profiling.gpu import warm_cache
from slotkernels._triton import Launch
from tree import add_one

source, target = torch.empty(48), torch.empty(64)[1:]  # whose address 16 does not divide


def misses(*arguments, **options):
    return warm_cache.check([Launch(add_one, arguments, {"BLOCK": 64, **options})], Path("cache"))


absent = ["add_one: no compiled kernel in the cache"]
assert misses(source, target, 48, num_warps=2) == []
assert misses(source, target, 32, num_warps=2) == []
assert misses(source, target, 48, num_warps=4) == absent
assert misses(source, target, 48, num_warps=2, enable_fp_fusion=False) == absent
assert misses(source, target, 47, num_warps=2) == absent
assert misses(source, source, 48, num_warps=2) == absent
assert misses(source.half(), target, 48, num_warps=2) == absent
"""
LAUNCHED = """
import json
from collections import Counter
from profiling.gpu.launched import launched

print(json.dumps([Counter(launch.kernel.fn.__name__ for launch in launched(f"train_{s}")) for s in ("image", "video")]))
"""


def run(code, folder, *arguments):
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(folder), str(ROOT), str(ROOT / "kernels"), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"HOME": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, *(["-c", code] if code else ["-m", "profiling.gpu.warm_cache"]), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(warm_cache.unsupported() is not None, reason=f"{warm_cache.unsupported()}")
@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="there is no C compiler")
def test_cache_hits_elsewhere_until_arguments_or_options_differ(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "tree.py").write_text(KERNEL)
    assert "1 distinct kernels" in run(MAKE, here)
    there.mkdir()
    shutil.copy(here / "tree.py", there)
    shutil.move(here / "cache.tar.xz", there)
    shutil.rmtree(here)
    exports = run("", there, "--unpack", "cache.tar.xz", "--out", "cache").splitlines()
    assert exports[0] == f"export TRITON_CACHE_DIR={there / 'cache'}"
    assert exports[1].startswith("export TRITON_PTXAS_PATH=")
    assert Path(exports[1].partition("=")[2]).is_file()
    run(CHECK, there)


def test_steps_launch_what_is_pinned(tmp_path):
    pinned = json.loads(PINNED.read_text())["stages"]
    launches = json.loads(run(LAUNCHED, tmp_path))
    for stage, counts in zip(("image", "video"), launches, strict=True):
        expected = {name: n for name, n in pinned[stage]["own launches"].items() if "csrc" not in name}
        assert counts == expected, f"{stage}: {UPDATE}"
