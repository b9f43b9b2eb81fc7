"""Whether the compiled ops of csrc load here and compute: clusters of ten sets, against the reference."""

import argparse
import sys

import torch
from slotkernels import cluster_slots
from slotkernels._native import why_not_loaded

from profiling.bench.merging import THRESHOLD, correlated


def main() -> None:
    """The command; exits 1 with the reason if they do not."""
    parser = argparse.ArgumentParser(description=__doc__)
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
        sys.exit(f"csrc clusters otherwise than the reference: {labels.tolist()} against {expected.tolist()}")
    print(f"csrc loads, and clusters {len(slots)} sets as the reference does")


if __name__ == "__main__":
    main()
