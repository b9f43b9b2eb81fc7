"""Run GeomLoss's example programs with our SamplesLoss, and compare the result of each call with GeomLoss's.

    git clone https://github.com/jeanfeydy/geomloss
    pip install imageio scikit-learn matplotlib
    python -m profiling.geomloss_examples geomloss/examples --out profiling/results/geomloss-examples-cpu.json

One line of each program is changed, the import: ``from slotkernels import SamplesLoss``. Each program runs in its own
process, in a copy of its folder, without a display. If a picture that it reads is missing, one is constructed. At
every n-th call of a module, GeomLoss computes the value (or the potentials) and the gradient of their sum for the same
inputs. The reference for both is GeomLoss's dense backend in float64. Differences are relative to the tensor's largest
value, or to 1e-3 if that is larger.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import slotkernels
import torch
from slotkernels import SamplesLoss
from torch import Tensor

from profiling.common.machine import machine, save
from profiling.common.paths import ROOT
from profiling.geomloss_options import distances, require_geomloss

BEFORE, AFTER = "from geomloss import SamplesLoss", "from slotkernels import SamplesLoss"
OPTIONS = (
    "loss", "p", "blur", "reach", "diameter", "scaling", "truncate", "cost", "kernel", "cluster_scale", "debias",
    "potentials", "verbose", "backend",
)  # fmt: skip
PICTURE = re.compile(r"""["'](data/\w+\.png)["']""")
SIDE = 256  # of a constructed picture
MEASURES = ("difference", "ours from float64", "GeomLoss's from float64")


def outputs_and_gradients(module: torch.nn.Module, tensors: tuple[Tensor, ...], double: bool) -> dict[str, Tensor]:
    """The results of a call and the gradients of their sum, in float64."""
    leaves = [t.detach().clone() for t in tensors]
    leaves = [t.double() if double and t.is_floating_point() else t for t in leaves]
    for leaf, t in zip(leaves, tensors, strict=True):
        leaf.requires_grad_(t.requires_grad)
    with torch.enable_grad():
        returned = module(*leaves)
        results = returned if isinstance(returned, tuple) else (returned,)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(sum(t.sum() for t in results), wanted) if wanted else ()
    name = "value" if isinstance(returned, Tensor) else "potentials"
    named = {f"{name} {i}": t for i, t in enumerate(results)} | {f"gradient {i}": t for i, t in enumerate(gradients)}
    return {key: t.detach().double().flatten() for key, t in named.items()}


class Compared(SamplesLoss):
    """Our module, which also calls GeomLoss's at its first call and at every n-th call after it."""

    every, calls, compared = 1, 0, 0
    largest: dict[str, dict[str, dict[str, float]]] = {}  # noqa: RUF012 - of the whole process
    own_calls = 0

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss; see the class."""
        result = super().forward(*tensors)
        Compared.calls += 1
        if self.own_calls % Compared.every == 0:
            self.compare(tensors)
        self.own_calls += 1
        return result

    def describe(self) -> str:
        """The loss: "energy", "sinkhorn, p=1", "sinkhorn, p=2, multiscale"."""
        parts = [self.loss, *([f"p={self.p}"] if self.loss == "sinkhorn" else [])]
        return ", ".join([*parts, *(["multiscale"] if self.backend == "multiscale" else [])])

    def compare(self, tensors: tuple[Tensor, ...]) -> None:
        """Keep the largest differences so far."""
        import geomloss

        options = {name: getattr(self, name) for name in OPTIONS} | {"verbose": False}
        ours = outputs_and_gradients(SamplesLoss(**options), tensors, double=False)
        theirs = outputs_and_gradients(geomloss.SamplesLoss(**options), tensors, double=False)
        dense = geomloss.SamplesLoss(**options | {"backend": "tensorized"})
        exact = outputs_and_gradients(dense, tensors, double=True)
        Compared.compared += 1
        pairs = ((ours, theirs), (ours, exact), (theirs, exact))
        for measure, pair in zip(MEASURES, pairs, strict=True):
            for kind, found in distances(*pair).items():
                entry = Compared.largest.setdefault(self.describe(), {}).setdefault(kind, {})
                entry[measure] = max(found, entry.get(measure, 0.0))


def picture(name: str) -> np.ndarray:
    """[SIDE, SIDE, 3] in 0 … 1: three coloured blobs on white, elsewhere for another name."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    image = np.ones((SIDE, SIDE, 3))
    for channel in range(3):
        y, x = rng.uniform(0.25, 0.75, 2)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 0.01)
        image -= blob[..., None] * (np.arange(3) != channel)
    return image.clip(0, 1)


def run_one(program: Path, every: int) -> dict[str, Any]:
    """Run a program in this process; its plots are discarded."""
    from PIL import Image

    text = program.read_text()
    for name in PICTURE.findall(text):
        if not Path(name).exists():
            Image.fromarray((255 * picture(name)).astype(np.uint8)).save(name)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the programs draw from it
    random.seed(0)
    Compared.every = every
    slotkernels.SamplesLoss = Compared  # type: ignore[misc]
    sys.path.insert(0, str(Path.cwd()))
    error = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(text.replace(BEFORE, AFTER), program.name, "exec"), {"__name__": "__main__"})
    except Exception as failure:  # a program may fail in any way; the report names it
        error = f"{type(failure).__name__}: {failure}"
    return {
        "error": error,
        "calls": Compared.calls,
        "compared": Compared.compared,
        "largest": Compared.largest,
        "code": digest(text),
    }


def digest(text: str) -> str:
    """Of a program without its comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(body) > 1:
                body.pop(0)
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def run(program: Path, every: int, timeout: float) -> dict[str, Any]:
    """Run a program in its own process, in a copy of its folder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "example"
        shutil.copytree(program.parent, folder)
        for name in ("data", "output"):
            (folder / name).mkdir(exist_ok=True)
        report = Path(parent) / "report.json"
        command = [sys.executable, "-m", "profiling.geomloss_examples", program.name, "--every", str(every)]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(paths)}
        try:
            done = subprocess.run(
                [*command, "--report", str(report)],
                cwd=folder, env=environment, timeout=timeout, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"not finished after {timeout:.0f} s"}
        if not report.exists():
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        result: dict[str, Any] = json.loads(report.read_text())
        return result


def main() -> None:
    """Run all programs below a folder that import SamplesLoss, and save what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path, help="GeomLoss's folder of examples, or one program")
    parser.add_argument("--every", type=int, default=10, help="compare each n-th call (default 10)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each program (default 600)")
    parser.add_argument("--out", type=Path, help="file of results")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # run the program here, as the child process
    arguments = parser.parse_args()
    require_geomloss()
    if not arguments.examples.exists():
        parser.error(
            f"{arguments.examples}: no such file or folder. Expected GeomLoss's folder examples, or one of its programs"
        )
    if arguments.report is not None:
        arguments.report.write_text(json.dumps(run_one(arguments.examples, arguments.every)))
        return
    programs = sorted(arguments.examples.rglob("*.py")) if arguments.examples.is_dir() else [arguments.examples]
    results = {}
    for program in (program for program in programs if BEFORE in program.read_text()):
        name = program.relative_to(arguments.examples).as_posix() if arguments.examples.is_dir() else program.name
        results[name] = run(program.resolve(), arguments.every, arguments.timeout)
        print(name, json.dumps(results[name]), flush=True)
    if arguments.out is not None:
        what = "GeomLoss's example programs with the import changed: largest relative differences of every n-th call"
        command = "python -m profiling.geomloss_examples EXAMPLES --out profiling/results/geomloss-examples-cpu.json"
        details = {
            "command": command,  # without paths of this machine
            "geomloss": metadata.version("geomloss"),
            "every": arguments.every,
            "programs": results,
        }
        save(arguments.out, {"what": what, **machine("cpu"), **details})


if __name__ == "__main__":
    main()
