"""Streaming Sinkhorn on KeOps: each reduction over all pairs is one compiled loop, and no matrix is stored.

KeOps compiles each reduction at its first use (about 6 s; the result stays in its cache folder). It launches on CUDA's
NULL stream and synchronises, so it cannot run inside a captured graph. Its loops are made for points of up to about 100
dimensions. Sums of exponentials are faster than log-sum-exps, so a log-sum-exp is computed only if the sum leaves the
range of the dtype.

Some installations crash the process when KeOps first computes on a GPU, so a child process tries it first.
"""

import atexit
import contextlib
import importlib.util
import io
import os
import platform
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._backends import Arguments, device_of
from ..._checks import accumulate_dtype
from ..problem import Problem
from ..reference import NEAREST
from . import annealing
from .pair import centre, log_weights, out_of_range
from .problem import StreamingBackwardArguments, StreamingSolution

_HOW = "pip install pykeops"

# Points are in units of sqrt(2 eps) for p = 2 and of eps for p = 1. Costs are flat below the squared distance C.
_EXPONENT = {2: "R + S - SqDist(X, Y)", 1: "R + S - Sqrt(ReLU(SqDist(X, Y) - C) + C)"}
_SLOPE = {2: "X - Y", 1: "IfElse(SqDist(X, Y) - C, Rsqrt(SqDist(X, Y)), Zero(1)) * (X - Y)"}


# Program of the child process: eight equal points, so that each of the eight sums of exponentials is 8.
_TRIAL = """
import sys
sys.path[:] = {path!r}
import torch
from slotkernels.sinkhorn.streaming import keops
x, zeros = torch.zeros(1, 8, 3, device={device!r}), torch.zeros(1, 8, 1, device={device!r})
reason = keops._why_not_imported() or keops._why_not_found(x.device)
if not reason and not torch.allclose(sums := keops._reduce("Sum", 2, x, x, zeros, zeros), zeros + 8):
    reason = f"sums of 8 came out as {{sums.flatten().tolist()}}"
sys.exit(reason)
"""
_TRIAL_SECONDS = 180  # two compilations, and waiting for other processes that compile


def _folder() -> Path:
    folder = Path(os.environ.get("KEOPS_CACHE_FOLDER") or Path.home() / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One process at a time: KeOps writes its cache in place, where another process could read half a file."""
    import fcntl  # here, as it is missing on Windows (and so is KeOps)

    with open(_folder() / "slotkernels_keops.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def _why_not_imported() -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return f"pykeops is not installed: {_HOW}"
    try:
        with alone(), contextlib.redirect_stdout(io.StringIO()):  # the import prints a report on the machine
            import pykeops.torch  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        return f"pykeops cannot be imported ({type(error).__name__}: {error}): pip install --force-reinstall pykeops"
    _alone_at_exit()
    return None


@cache  # a second handler would wait forever for the lock of the first
def _alone_at_exit() -> None:
    """Take the lock when the process ends, before KeOps saves its cache; it is freed with the process."""
    atexit.register(contextlib.ExitStack().enter_context, alone())  # later than KeOps's handler, so it runs earlier


def _why_not_found(device: torch.device) -> str | None:
    """Why KeOps, once imported, has no compiler or no GPU for the device, or None."""
    from pykeops import config

    if device.type == "cpu":
        return None if config.pykeops_base.get_cxx_compiler() else "pykeops finds no C++ compiler (g++ or CXX)"
    return None if config.gpu_available else "pykeops finds no CUDA libraries (see pykeops.check_health())"


@cache
def _why_not_on_gpu(device: torch.device) -> str | None:
    """Why a child process could not compute with KeOps on the GPU, or None.

    Success is remembered by a file in the cache folder, named after machine, versions and GPU. After a failure each
    process tries again.
    """
    try:
        keops = metadata.version("pykeops")
    except metadata.PackageNotFoundError:
        return f"pykeops is not installed: {_HOW}"
    gpu = torch.cuda.get_device_name(device)
    key = (platform.node(), platform.python_version(), keops, torch.__version__, gpu)
    try:
        marker = _folder() / ("slotkernels_keops_works_" + re.sub(r"[^\w.+-]", "-", "_".join(key)))
        failure = None if marker.exists() else _trial(device)
        if failure is None:
            marker.touch()
            return None
    except OSError as error:  # the folder cannot be written, or there is no Python
        failure = f"was not started ({error})"
    reason = (
        f"KeOps cannot compute on {gpu}: a trial in a child process {failure} (pykeops {keops}, torch "
        f"{torch.__version__}, CUDA {torch.version.cuda}). backend='blocks' needs no KeOps; pykeops.check_health() "
        "shows what KeOps finds on this machine; uninstalling pykeops skips the trial"
    )
    warnings.warn(f"slotkernels.sinkhorn: {reason}.", RuntimeWarning, stacklevel=2)  # each process waits for its trial
    return reason


def _trial(device: torch.device) -> str | None:
    """How the child process failed, or None. The lock must be free, as the child takes it."""
    command = [sys.executable or "", "-c", _TRIAL.format(path=sys.path, device=str(device))]
    output: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "errors": "replace"}
    try:
        child = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_TRIAL_SECONDS, **output)
    except subprocess.TimeoutExpired:
        return f"did not end within {_TRIAL_SECONDS} s"
    if child.returncode < 0:
        return f"died by signal {-child.returncode} ({signal.strsignal(-child.returncode)})"
    last = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
    return f"failed: {last}" if child.returncode else None


def why_not(arguments: Arguments) -> str | None:
    """Why KeOps cannot run the call, or None."""
    device = device_of(arguments)
    if device.type not in ("cpu", "cuda"):
        return f"tensors on {device.type}"
    reason = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return "KeOps launches on the NULL stream, which a CUDA graph cannot capture"
        reason = _why_not_on_gpu(device)  # before the import, which loads CUDA's libraries too
    return reason or _why_not_imported() or _why_not_found(device)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Context in which KeOps compiles: one process at a time, without output. ``what`` is for the error message."""
    import pykeops

    verbose = pykeops.verbose
    pykeops.set_verbose(False)
    try:
        with alone():
            yield
    except Exception as error:  # of a compiler, a cache or a formula: anything
        raise RuntimeError(
            f"slotkernels.sinkhorn: KeOps cannot compile {what} ({type(error).__name__}: {error}); "
            "pykeops.check_health() says what is missing, pykeops.clean_pykeops() empties a cache that was cut off"
        ) from error
    finally:
        pykeops.set_verbose(verbose)


def backend_of(device: torch.device) -> str:
    """KeOps's name of the device."""
    return "CPU" if device.type == "cpu" else "GPU"


def synchronize(device: torch.device) -> None:
    """Wait for the device's current stream: KeOps runs on the NULL stream, which waits for no other."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        if stream != torch.cuda.default_stream(device):
            stream.synchronize()


@cache
def _reduction(name: str, p: int, dim: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The reduction over the points of Y, compiled and loaded by a call on single points."""
    from pykeops.torch import Genred

    variables = [f"X = Vi({dim})", f"Y = Vj({dim})", "R = Vi(1)", "S = Vj(1)", *(["C = Vi(1)"] if p == 1 else [])]
    formula = f"Exp({_EXPONENT[p]})" if name == "Sum" else _EXPONENT[p]
    reduction = Genred(formula, variables, name, axis=1, formula2=_SLOPE[p] if name == "SumSoftMaxWeight" else None)
    point, number = (torch.zeros(1, 1, width, dtype=dtype, device=device) for width in (dim, 1))
    with compiling(f"the formula {formula!r}"):
        reduction(point, point, *[number] * (len(variables) - 2), backend=backend_of(device))
    return reduction


def _reduce(name: str, p: int, *arrays: Tensor) -> Tensor:
    """One reduction over the points of Y; arrays are [B, N or M, D or 1]."""
    points = arrays[0]
    if not len(points):
        return points if name == "SumSoftMaxWeight" else arrays[2]
    reduction = _reduction(name, p, points.shape[2], points.dtype, points.device)
    tensors = [t.contiguous() for t in arrays]
    synchronize(points.device)
    return reduction(*tensors, backend=backend_of(points.device))


def sinkhorn_streaming(problem: Problem) -> StreamingSolution:
    """Anneal, visiting all pairs at each step."""
    return annealing.solve(Pair, problem)


def sinkhorn_streaming_backward(arguments: StreamingBackwardArguments) -> tuple[Tensor, Tensor]:
    """Gradients of x and y through the last update."""
    return annealing.gradients(Pair, arguments)


class Pair:
    """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""

    def __init__(self, x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, p: int) -> None:
        self.p, self.dtype = p, accumulate_dtype(x.dtype)
        origin = centre(x, a)
        self.x, self.logs = x.double() - origin, log_weights(a, x)
        self.other = None if y is None else (y.double() - origin, log_weights(b, y))

    def softmin(self, eps: float | Tensor, f: Tensor, g: Tensor | None = None) -> Tensor:
        """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""
        if self.other is None or g is None:
            return self._softmin(self.x, self.x, self.logs, eps, f, f)
        y, logs = self.other
        return torch.cat((self._softmin(self.x, y, logs, eps, f, g), self._softmin(y, self.x, self.logs, eps, g, f)), 1)

    def _softmin(self, x: Tensor, y: Tensor, logs: Tensor, eps: float | Tensor, f: Tensor, g: Tensor) -> Tensor:
        arrays, _ = self._arrays(x, y, logs, eps, f, g)
        sums = _reduce("Sum", self.p, *arrays)
        logs, bad = sums.log(), out_of_range(sums)
        if bad.any():
            logs = torch.where(bad, _reduce("LogSumExp", self.p, *arrays), logs)
        return (arrays[2].double() - logs).squeeze(2) * eps

    def gradient(self, eps: float, f: Tensor, g: Tensor) -> Tensor:
        """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""
        y, logs = self.other or (self.x, self.logs)
        arrays, unit = self._arrays(self.x, y, logs, eps, f, g)
        gradient = _reduce("SumSoftMaxWeight", self.p, *arrays).double()
        return gradient.mul_(unit) if self.p == 2 else gradient

    def _arrays(
        self, x: Tensor, y: Tensor, logs: Tensor, eps: float | Tensor, f: Tensor, g: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """X, Y, R, S (and C) of the formulas, and the unit of length [B, 1, 1]."""
        temperature = eps if isinstance(eps, Tensor) else x.new_full((len(x), 1), eps)
        unit = ((2 * temperature).sqrt() if self.p == 2 else temperature).unsqueeze(2)
        arrays = [x / unit, y / unit, (f / eps).unsqueeze(2), (g / eps + logs).unsqueeze(2)]
        if self.p == 1:
            arrays.append((NEAREST / unit.square()).expand(-1, x.shape[1], -1))
        return [t.to(self.dtype) for t in arrays], unit
