"""Check that the compiled ops of csrc load on this machine, and cluster ten sets as the reference does.

python -m profiling.gpu.native
python -m profiling.gpu.native --device cpu
"""

import argparse
import sys

import torch
from slotkernels import cluster_slots
from slotkernels._native import why_not_loaded

from profiling.bench.merging import THRESHOLD, correlated


def main() -> None:
    """The command; if the check fails, it prints the reason and its exit status is 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    for library in ("_C", "_C_cuda") if device == "cuda" else ("_C",):
        reason = why_not_loaded(library)
        if reason is not None:
            sys.exit(reason)
    torch.manual_seed(0)
    slots = correlated(10, 20, 64).to(device)
    labels, expected = (
        cluster_slots(slots, THRESHOLD, backend=backend)[0]
        for backend in ("cuda" if device == "cuda" else "cpp", "reference")
    )
    if not torch.equal(labels, expected):
        sys.exit(f"csrc and the reference give different clusters: {labels.tolist()} against {expected.tolist()}")
    print(f"csrc loads, and clusters {len(slots)} sets as the reference does")


if __name__ == "__main__":
    main()
