"""Time a training step before and after slotkernels replaces a part of a model: the pairs of examples/dropin.

    python -m profiling.dropin --out profiling/results/dropin-cpu.json

Install the packages that are replaced first: pip install slot-attention==1.5.2 geomloss==0.3.1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS, ROOT

PROGRAM = ROOT / "examples/dropin/compare.py"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="of training whose losses are compared (default 5)")
    parser.add_argument("--seconds", type=float, default=8, help="of timing for each pair (default 8)")
    parser.add_argument("--out", type=Path, default=RESULTS / "dropin-cpu.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.json"
        numbers = ["--steps", str(options.steps), "--seconds", str(options.seconds)]
        subprocess.run([sys.executable, PROGRAM, *numbers, "--json", file], check=True)
        pairs = json.loads(file.read_text())
    what = "float64 losses, float32 milliseconds of a training step, [before, after]; ratio: before / after, paired"
    replaced = {name: metadata.version(name) for name in ("slot-attention", "geomloss")}
    save(options.out, {"what": what, **machine("cpu"), "replaced": replaced, "pairs": pairs})


if __name__ == "__main__":
    main()
