"""``python -m slotkernels`` prints the versions, and for each backend whether it works here or why not."""

import sys
from importlib import metadata

import torch

from . import __version__
from ._backends import why_not_triton
from ._native import why_not_loaded
from .sinkhorn.streaming import keops


def backends() -> dict[str, tuple[str, str | None]]:
    """For each backend: what it is, and None or the reason why it does not work here."""
    no_gpu = None if torch.cuda.is_available() else "PyTorch sees no GPU"
    probe = torch.empty(0, device="cpu" if no_gpu else "cuda")
    return {
        "reference": ("plain PyTorch, any device", None),
        "blocks": ("plain PyTorch for large sets in the Sinkhorn divergence", None),
        "cpp": ("compiled ops on a CPU", why_not_loaded("_C")),
        "cuda": ("compiled ops on a GPU", no_gpu or why_not_loaded("_C") or why_not_loaded("_C_cuda")),
        "triton": ("Triton kernels on a GPU", no_gpu or why_not_triton((probe,))),
        "keops": ("KeOps for large sets in the Sinkhorn divergence", keops.why_not((probe,))),
    }


def two_owners() -> str | None:
    """What to do if two installed distributions contain this package, or None. They overwrite each other's files."""
    names = set(metadata.packages_distributions().get(__package__, ()))
    # a folder NAME.egg-info that a build left in a clone has no file RECORD
    owners = sorted(n for n in names if any(d.read_text("RECORD") for d in metadata.distributions(name=n)))
    if len(owners) < 2:
        return None
    return (
        f"Both {' and '.join(owners)} are installed and contain this package. Keep one: run "
        f"`pip uninstall {' '.join(owners)}`, then install the one that you want."
    )


def main() -> None:
    """Print the versions and the backends."""
    print(f"slotkernels {__version__}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    for name, (what, problem) in backends().items():
        print(f"{name:9}  {'no' if problem else 'yes':3}  {what}{f' ({problem})' if problem else ''}")
    if advice := two_owners():
        print(advice)


if __name__ == "__main__":
    main()
