"""Published code that is compared with ours: packages, and single definitions from clones that are not installed."""

import ast
import hashlib
import importlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Numbers = Callable[[int], np.ndarray]
"""What one side computes on the constructed input of a case: float64 [n]."""


class MissingPeerError(Exception):
    """A peer is not installed or not cloned; the message says how to get it."""


@dataclass(frozen=True)
class Peers:
    """Where peers are.

    Attributes:
        clones: folder with a clone of each repository, ``OWNER/NAME``; None if there are none.
    """

    clones: Path | None = None

    def package(self, name: str, distribution: str) -> tuple[Any, str]:
        """An installed module, and its version."""
        try:
            return importlib.import_module(name), f"{distribution} {importlib.metadata.version(distribution)}"
        except ImportError as error:
            raise MissingPeerError(f"pip install {distribution} ({error})") from error

    def definitions(self, repository: str, path: str, names: Sequence[str], **given: Any) -> dict[str, Any]:
        """Functions and classes of one file of a clone, executed alone: what the file imports is not needed.

        Args:
            repository: ``OWNER/NAME``.
            path: of the file in the clone.
            names: of the top-level definitions, in the order of the file.
            given: what they need of the file's imports, by name.

        Returns:
            The namespace after the definitions were executed.
        """
        if self.clones is None or not (file := self.clones / repository / path).is_file():
            raise MissingPeerError(f"clone github.com/{repository} to CLONES/{repository} and give --clones CLONES")
        found = {
            node.name: node
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
        }
        if missing := [name for name in names if name not in found]:
            raise MissingPeerError(f"{file} does not define {', '.join(missing)}; check out another commit")
        module = ModuleType(f"peer_{abs(hash(file))}")
        sys.modules[module.__name__] = module  # Flax's dataclasses look up their module by its name
        vars(module).update(given)
        code = compile(ast.Module([found[name] for name in names], []), str(file), "exec")
        exec(code, vars(module))
        return vars(module)

    def commit(self, repository: str) -> str:
        """The commit of a clone: that of Git, or of a file ``COMMIT``; else a digest of its Python files."""
        assert self.clones is not None
        clone = self.clones / repository
        if (clone / "COMMIT").is_file():
            commit = (clone / "COMMIT").read_text().strip()
        elif (clone / ".git").exists():
            command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        else:
            contents = b"".join(file.read_bytes() for file in sorted(clone.rglob("*.py")))
            return f"{repository}, sha256 {hashlib.sha256(contents).hexdigest()[:12]}"
        return f"{repository}@{commit[:8]}"


@dataclass(frozen=True)
class Comparison:
    """One row of a table of docs/results/comparable_….md.

    Attributes:
        name: key in the results.
        peer: whose code it is.
        compared: what is computed on both sides.
        remark: which side is right if the two differ, or a remark if they agree.
        cases: number of constructed inputs.
        bound: largest difference that rounding explains; None if the two measure different things.
        ours: our numbers.
        theirs: opens the peer; its version, and its numbers.
    """

    name: str
    peer: str
    compared: str
    remark: str
    cases: int
    bound: float | None
    ours: Numbers
    theirs: Callable[[Peers], tuple[str, Numbers]]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest absolute difference, in units of the largest value of theirs if that is above 1.

    >>> difference(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    0.5
    """
    if ours.shape != theirs.shape or (np.isnan(ours) != np.isnan(theirs)).any():
        return float("inf")
    known = ~np.isnan(theirs)
    scale = max(1.0, float(np.abs(theirs[known]).max(initial=0)))
    return float(np.abs(ours[known] - theirs[known]).max(initial=0)) / scale
