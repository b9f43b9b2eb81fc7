"""Picks the backend that serves a call: by name, or the fastest that can.

An op is registered with PyTorch once (``torch.library.custom_op``); its body asks an :class:`Op` table for the module
that does the arithmetic. Adding a backend is one line beside the op::

    INVERTED_ATTENTION.add("triton", "slotkernels.slot_attention.triton", supports=why_not_triton)

The module is imported at the first call that needs it, so ``import slotkernels`` needs no compiler and no GPU. It
defines a function named like the op, and ``<op>_backward`` if the op is differentiable, with the arguments of
``reference.py``.

If a kernel cannot be built on this machine, ``auto`` warns once and takes the next backend; a backend asked for by name
raises. ``SLOTKERNELS_STRICT=1`` makes ``auto`` raise too, as tests and benchmarks want it.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# "auto" takes the first of these that supports the call.
BACKENDS = ("cuda", "triton", "cpp", "keops", "blocks", "reference")
ENVIRONMENT_VARIABLE = "SLOTKERNELS_BACKEND"
STRICT_VARIABLE = "SLOTKERNELS_STRICT"

_override: ContextVar[str | None] = ContextVar("slotkernels_backend", default=None)


@dataclass(frozen=True)
class Call:
    """What a backend may look at when it says whether it can serve a call."""

    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the first tensor (all tensors of a call share it)."""
        return next(t for t in self.tensors if t is not None).device


class KernelBuildError(RuntimeError):
    """A kernel cannot be built or loaded on this machine; other backends may serve.

    Args:
        kernel: its name.
        tensors: dtypes and shapes of what it was launched on.
        reason: first line of the compiler's error.
        remedy: what the user can do.
    """

    def __init__(self, kernel: str, tensors: str, reason: str, remedy: str) -> None:
        super().__init__(f"kernel {kernel} cannot be built for {tensors}: {reason}. {remedy}")
        self.kernel = kernel


Supports = Callable[[Call], str | None]


def _always(call: Call) -> str | None:
    return None


class Op:
    """The table of one op's backends."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._backends: dict[str, tuple[str, Supports]] = {}
        self._unbuilt: set[tuple[str, ...]] = set()  # calls whose kernels could not be built
        self._warned: set[str] = set()  # kernels

    def add(self, backend: str, module: str, supports: Supports = _always) -> None:
        """Serve this op by the functions of ``module`` (dotted path) whenever ``supports(call)`` returns None.

        Otherwise ``supports`` returns the reason, which the user reads when asking for this backend by name.
        """
        self._backends[check_name(backend)] = (module, supports)

    def available(self, call: Call) -> tuple[str, ...]:
        """Names of the backends that can serve the call, fastest first."""
        return tuple(name for name in BACKENDS if self._refusal(name, call) is None)

    def select(self, requested: str, call: Call, without: tuple[str, ...] = ()) -> str:
        """Name of the backend for this call; "auto" passes over those in ``without``.

        Raises:
            ValueError: if no backend has that name.
            RuntimeError: if the backend asked for by name cannot serve the call; the message says why.
        """
        if check_name(requested, allow_auto=True) == "auto":
            names = (name for name in BACKENDS if name not in without and not _only_by_name(name, call))
            return next(name for name in names if self._refusal(name, call) is None)
        reason = self._refusal(requested, call)
        if reason is not None:
            raise RuntimeError(self._cannot_serve(requested, call, f"{reason}."))
        return requested

    def load(self, requested: str, call: Call) -> ModuleType:
        """The selected backend's module."""
        return importlib.import_module(self._backends[self.select(requested, call)][0])

    def run(self, requested: str, call: Call, function: str, *args: Any) -> Any:
        """Call ``function`` of the selected backend's module, with autocast off.

        Raises:
            RuntimeError: if a kernel cannot be built and the backend was asked for by name, or the mode is strict.
        """
        _check_no_tangent(self.name, call.tensors)
        with without_autocast(call.device):
            backend = self.select(requested, call, self._without(requested, call, function))
            try:
                return getattr(importlib.import_module(self._backends[backend][0]), function)(*args)
            except KernelBuildError as error:
                self._note_unbuilt(requested, backend, call, function, error)
        return self.run(requested, call, function, *args)

    def _without(self, requested: str, call: Call, function: str) -> tuple[str, ...]:
        """Backends that "auto" passes over because their kernels could not be built for an earlier call like this."""
        if not self._unbuilt or requested != "auto":
            return ()
        key = _kind(call, function)
        return tuple(name for name in self._backends if (name, *key) in self._unbuilt)

    def _note_unbuilt(self, requested: str, backend: str, call: Call, function: str, error: KernelBuildError) -> None:
        """Raise, or let later calls like this pass over the backend and warn once for each kernel."""
        if requested != "auto":
            raise RuntimeError(self._cannot_serve(backend, call, str(error))) from error
        if os.environ.get(STRICT_VARIABLE, "0").lower() in ("1", "true", "yes", "on"):
            raise RuntimeError(
                f"slotkernels.{self.name}: {error} ({STRICT_VARIABLE} does not allow another backend)"
            ) from error
        self._unbuilt.add((backend, *_kind(call, function)))
        if error.kernel not in self._warned:
            self._warned.add(error.kernel)
            other = self.select("auto", call, self._without(requested, call, function))
            warnings.warn(
                f"slotkernels.{self.name}: {error} Backend {other!r} serves this call and others like it, more slowly; "
                f"{STRICT_VARIABLE}=1 raises instead, with the compiler's whole message.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _cannot_serve(self, backend: str, call: Call, reason: str) -> str:
        others = ", ".join(name for name in self.available(call) if name != backend) or "none"
        return f"slotkernels.{self.name}: backend {backend!r} cannot serve this call: {reason} Available: {others}."

    def _refusal(self, name: str, call: Call) -> str | None:
        if name not in self._backends:
            return f"it is not implemented for {self.name} or was not built"
        return self._backends[name][1](call)


def _check_no_tangent(op: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Refuse a forward-mode derivative that a kernel would drop.

    Eager calls never come here with one (see ``_derivatives.py``), but a compiled function was traced without.
    """
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and not tensor.requires_grad and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"slotkernels.{op}: its kernels have no forward-mode derivatives; do not compile the function, or "
                "compile it inside the forward-mode level"
            )


def _kind(call: Call, function: str) -> tuple[str, ...]:
    """What a kernel is compiled for, roughly: the function, dtypes, and sizes but for that of the batch."""
    return (function, *("-" if t is None else f"{t.dtype} {list(t.shape[1:])}" for t in call.tensors))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Ops choose their precision themselves."""
    enabled = torch.is_autocast_enabled(device.type)  # asked first, as turning it off costs 10 us
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def _only_by_name(name: str, call: Call) -> bool:
    """What is right but slow: on a CPU Triton's interpreter (a thousand times), and KeOps' scalar loops (ten times)."""
    return name in ("triton", "keops") and call.device.type == "cpu"


def check_name(name: str, allow_auto: bool = False) -> str:
    """Return ``name`` if it is a backend's, else raise ValueError."""
    known = ("auto", *BACKENDS) if allow_auto else BACKENDS
    if name not in known:
        raise ValueError(f"backend={name!r} is unknown; expected one of {', '.join(known)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call in the ``with`` block that does not name its own.

    Nests, and is private to the thread or async task. It wins over the environment variable ``SLOTKERNELS_BACKEND``,
    and ``"auto"`` undoes both. A compiled function keeps the backend that was in force when it was traced, so put the
    block around the first call of the compiled function, not inside it.

    Args:
        name: "auto", "reference", "triton", "cpp", "cuda", or for the Sinkhorn divergence in linear memory "keops" or
            "blocks" (plain PyTorch).

    Raises:
        ValueError: if no backend has that name.
    """
    token = _override.set(check_name(name, allow_auto=True))
    try:
        yield
    finally:
        _override.reset(token)


@torch.compiler.assume_constant_result  # Dynamo cannot trace a ContextVar
def _default_backend() -> str:
    name = _override.get()
    if name is not None:
        return name
    return check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", allow_auto=True)


def requested_backend(backend: str) -> str:
    """The backend an op is asked for: the argument, else ``use_backend``, else the environment, else "auto"."""
    return _default_backend() if check_name(backend, allow_auto=True) == "auto" else backend


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(call: Call) -> str | None:
    """Why no Triton kernel can serve the call, or None: what every op with such kernels asks first."""
    if not _has_triton():
        return "triton is not installed"
    if any(t is not None and t.dtype == torch.float64 for t in call.tensors):
        return "float64 tensors"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    if call.device.type == "cpu" and interpreted:
        return None
    if call.device.type == "cuda" and torch.cuda.get_device_capability(call.device) < (8, 0):
        return f"{torch.cuda.get_device_name(call.device)} is older than compute capability 8.0"
    if call.device.type != "cuda":
        return f"tensors on {call.device.type} (TRITON_INTERPRET=1 runs Triton's interpreter on CPU tensors, for tests)"
    return None
