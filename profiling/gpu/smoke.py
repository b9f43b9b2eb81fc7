"""Compare values and gradients of every op with float64, at the sizes of the benchmarks.

    python -m profiling.gpu.smoke --out smoke.json
    python -m profiling.gpu.smoke --device cpu --workers 1 --only merge_slots

Each op has its own process, so that an illegal memory access ends only that process. SLOTKERNELS_STRICT is set, so a
kernel that does not compile is an error; otherwise `auto` would use the next backend.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from profiling.bench import BENCHMARKS
from profiling.common.machine import machine, save

OPS = tuple(name for name in BENCHMARKS if not name.startswith("train"))


@dataclass
class Options:
    """Compare values and gradients of every op with float64, one process for each op."""

    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """Where."""
    seconds: float = 80
    """Time limit for an op, in seconds."""
    workers: int = 4
    """Number of processes that run at the same time."""
    only: tuple[str, ...] = OPS
    """Ops to check. Default: all."""
    variants: tuple[str, ...] = ("slotkernels",)
    """Variants to compare, as for profiling.bench. With "all" the baselines are compiled too, and later
    timings find them in the caches."""
    out: Path | None = None
    """File for the results, as JSON."""


def look_at(name: str, options: Options) -> dict[str, Any]:
    """Result of one op: its cases, or the error that ended it."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "profiling.bench", "--only", name, "--check"]
        command += ["--variants", *options.variants, "--device", options.device, "--out", str(out)]
        environment = {**os.environ, "SLOTKERNELS_STRICT": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=options.seconds
            )
            lines, code = done.stderr.splitlines(), done.returncode
        except subprocess.TimeoutExpired:
            lines, code = [f"it took more than {options.seconds:g} s"], 124
        results = json.loads(out.read_text()) if out.exists() else {"benchmarks": {}, "failed": {}}
    result: dict[str, Any] = {"seconds": time.perf_counter() - begin}
    if name in results["benchmarks"]:
        return result | {"fate": "right", "cases": results["benchmarks"][name]["cases"]}
    error = results["failed"].get(name) or f"exit status {code}: " + " | ".join(lines[-6:])
    return result | {"fate": "failed", "error": error}


def show(name: str, result: dict[str, Any]) -> None:
    """Print one op."""
    print(f"{name}: {result['fate']} in {result['seconds']:.0f} s", result.get("error", "")[:1500], flush=True)
    for case in result.get("cases", ()):
        sizes = ", ".join(f"{key} {value}" for key, value in case["shape"].items())
        backends = ", ".join(sorted(set(case["backends"].values())))
        print(f"    {sizes}, {case['dtype']}, by {backends}")
        for variant, one in case["variants"].items():
            errors = ", ".join(f"{key} {value:.1e}" for key, value in one["errors"].items())
            print(f"        {variant}: {errors}; first call {one['first_call_s']:.1f} s")


def main() -> None:
    """The command."""
    options = tyro.cli(Options, prog="python -m profiling.gpu.smoke", description=__doc__)
    with ThreadPoolExecutor(options.workers) as pool:
        futures = {name: pool.submit(look_at, name, options) for name in options.only}
        results = {}
        for name, future in futures.items():
            results[name] = future.result()
            show(name, results[name])
    if options.out:
        what = "values and gradients of every op against float64, at the benchmarks' sizes"
        save(options.out, {"what": what, **machine(options.device), "ops": results})
    failed = [name for name, one in results.items() if one["fate"] != "right"]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
