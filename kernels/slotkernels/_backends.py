"""Chooses the backend of a call: the one that the caller names, or the fastest that supports the call.

Each operation has a table of :class:`Backends`. One line next to the operation adds a backend::

    INVERTED_ATTENTION.add("triton", "slotkernels.slot_attention.triton", supports=why_not_triton)

The module is imported at the first call that needs it, so ``import slotkernels`` needs no compiler and no GPU. The
module defines a function with the name of the operation. Its argument is one ``NamedTuple`` with the operation's
arguments.

If a kernel cannot be built on this machine, ``auto`` warns once and uses the next backend. A backend that the caller
names raises an error instead. With ``SLOTKERNELS_STRICT=1``, for tests and benchmarks, ``auto`` raises the error too.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# "auto" uses the first of these that supports the call.
BACKENDS = ("cuda", "triton", "cpp", "keops", "blocks", "reference")
ENVIRONMENT_VARIABLE = "SLOTKERNELS_BACKEND"
STRICT_VARIABLE = "SLOTKERNELS_STRICT"

_any_autocast = torch._C._is_any_autocast_enabled
_environment, _ENVIRONMENT_KEY = os.environ._data, os.environ.encodekey(ENVIRONMENT_VARIABLE)  # type: ignore[attr-defined]
_override: ContextVar[str | None] = ContextVar("slotkernels_backend", default=None)
_decomposed: ContextVar[bool] = ContextVar("slotkernels_decomposed", default=False)

Arguments = tuple[Any, ...]  # a NamedTuple of tensors, settings, lists of them, and other NamedTuples
Supports = Callable[[Any], str | None]
_NESTED = (tuple, list)
_SETTINGS = frozenset((float, int, bool, str, type(None)))  # types of arguments that hold no tensor
_ONLY_BY_NAME = ("triton", "keops")  # slow on a CPU: Triton's interpreter 1000x, KeOps 10x


class KernelBuildError(RuntimeError):
    """A kernel cannot be built or loaded on this machine; other backends may support the call.

    Args:
        kernel: its name.
        tensors: dtypes and shapes of the tensors that it was launched on.
        reason: first line of the compiler's error.
        remedy: what the user can do.
    """

    def __init__(self, kernel: str, tensors: str, reason: str, remedy: str) -> None:
        super().__init__(f"kernel {kernel} cannot be built for {tensors}: {reason}. {remedy}")
        self.kernel = kernel


def tensors_of(arguments: Arguments | list[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments, in order."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _NESTED):
            yield from tensors_of(value)


def has_float64(arguments: Arguments | list[Any]) -> bool:
    """Whether any of the tensors is float64. A loop is faster than a generator, and every call runs this."""
    for value in arguments:
        if type(value) in _SETTINGS:
            continue
        if isinstance(value, Tensor):
            if value.dtype is torch.float64:
                return True
        elif isinstance(value, _NESTED) and has_float64(value):
            return True
    return False


def first_tensor(arguments: Arguments) -> Tensor:
    """The first tensor; all tensors of a call share its device."""
    for value in arguments:  # a loop is faster than a generator, and every call runs this
        if isinstance(value, Tensor):
            return value
    return next(tensors_of(arguments))


def device_of(arguments: Arguments) -> torch.device:
    """Device of all tensors of a call."""
    return first_tensor(arguments).device


def _always(arguments: Arguments) -> str | None:
    return None


class Backends:
    """The backends of one operation.

    Args:
        name: name of the operation, for error messages.
        function: name of the function in every backend's module; ``name`` if None.
        like: an operation whose backends are used for this one too: the forward pass, if this is a backward pass.
    """

    def __init__(self, name: str, function: str | None = None, like: "Backends | None" = None) -> None:
        self.name, self.function = name, function or name
        # fastest first
        self._backends: dict[str, tuple[str, Supports]] = {} if like is None else like._backends
        self._unbuilt: set[tuple[str, ...]] = set() if like is None else like._unbuilt  # calls without a kernel
        self._warned: set[str] = set() if like is None else like._warned  # kernels

    def add(self, backend: str, module: str, supports: Supports = _always) -> None:
        """Add a backend: a function of ``module`` (dotted path), used for calls for which ``supports`` returns None.

        For all other calls ``supports(arguments)`` returns the reason. The user sees it in the error if the backend was
        chosen by name. In a backward pass, ``supports`` gets ``arguments.forward`` if there is such a field.
        """
        added = {**self._backends, check_name(backend): (module, supports)}
        self._backends.clear()  # the backward pass has the same dictionary
        self._backends.update((name, added[name]) for name in BACKENDS if name in added)

    def available(self, arguments: Arguments) -> tuple[str, ...]:
        """Names of the backends that support the call, fastest first."""
        return tuple(name for name in BACKENDS if self._refusal(name, arguments) is None)

    def select(self, requested: str, arguments: Arguments, without: tuple[str, ...] = ()) -> str:
        """Name of the backend for this call; "auto" skips the backends in ``without``.

        Raises:
            ValueError: if no backend has that name.
            RuntimeError: if the named backend does not support the call; the message contains the reason.
        """
        if requested == "auto":
            on_cpu, asked = first_tensor(arguments).is_cpu, getattr(arguments, "forward", arguments)
            for name, (_, supports) in self._backends.items():
                if name in without or (on_cpu and name in _ONLY_BY_NAME):
                    continue
                if supports(asked) is None:
                    return name
        reason = self._refusal(check_name(requested, allow_auto=True), arguments)
        if reason is not None:
            raise RuntimeError(self._cannot_serve(requested, arguments, f"{reason}."))
        return requested

    def load(self, backend: str) -> Callable[[Any], Any]:
        """The function of the backend of that name."""
        module = self._backends[backend][0]
        function = getattr(sys.modules.get(module), self.function, None)  # None while another thread imports the module
        return function or getattr(importlib.import_module(module), self.function)

    def run(self, requested: str, arguments: Arguments, chosen: str | None = None) -> Any:
        """Call the selected backend's function with the arguments, with autocast off.

        Args:
            requested: "auto", or the name of a backend.
            arguments: arguments of the operation.
            chosen: the backend that :meth:`choose` returned, now or in the forward pass; None: choose now.

        Raises:
            RuntimeError: if a kernel cannot be built, and the backend was named or ``SLOTKERNELS_STRICT`` is set.
        """
        if forward_ad._current_level >= 0:
            _check_no_tangent(self.name, arguments)
        if _any_autocast():  # enter a context manager only if needed: it takes time
            device = device_of(arguments)
            if torch.is_autocast_enabled(device.type):
                with without_autocast(device):
                    return self.run(requested, arguments, chosen)
        if chosen is None or (self._unbuilt and (chosen, *self._kind(arguments)) in self._unbuilt):
            chosen = self.choose(requested, arguments)
        try:
            return self.load(chosen)(arguments)
        except KernelBuildError as error:
            self._note_unbuilt(requested, chosen, arguments, error)
        return self.run(requested, arguments)

    def choose(self, requested: str, arguments: Arguments) -> str:
        """Like :meth:`select`, but skip backends whose kernels could not be built for an earlier call of this kind."""
        return self.select(requested, arguments, self._without(requested, arguments) if self._unbuilt else ())

    def _without(self, requested: str, arguments: Arguments) -> tuple[str, ...]:
        """Backends that "auto" skips, because their kernels could not be built for an earlier call of this kind."""
        if requested != "auto":
            return ()
        kind = self._kind(arguments)
        return tuple(name for name in self._backends if (name, *kind) in self._unbuilt)

    def _note_unbuilt(self, requested: str, backend: str, arguments: Arguments, error: KernelBuildError) -> None:
        """Raise an error; or make later calls of this kind skip the backend, and warn once for each kernel."""
        if requested != "auto":
            raise RuntimeError(self._cannot_serve(backend, arguments, str(error))) from error
        if os.environ.get(STRICT_VARIABLE, "0").lower() in ("1", "true", "yes", "on"):
            raise RuntimeError(
                f"slotkernels.{self.name}: {error} ({STRICT_VARIABLE} does not allow another backend)"
            ) from error
        self._unbuilt.add((backend, *self._kind(arguments)))
        if error.kernel not in self._warned:
            self._warned.add(error.kernel)
            other = self.select("auto", arguments, self._without(requested, arguments))
            warnings.warn(
                f"slotkernels.{self.name}: {error} Such calls use the slower backend {other!r}; "
                f"set {STRICT_VARIABLE}=1 to get an error with the compiler's whole message.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _cannot_serve(self, backend: str, arguments: Arguments, reason: str) -> str:
        others = ", ".join(name for name in self.available(arguments) if name != backend) or "none"
        return f"slotkernels.{self.name}: backend {backend!r} cannot serve this call: {reason} Available: {others}."

    def _refusal(self, name: str, arguments: Arguments) -> str | None:
        if name not in self._backends:
            return f"it is not implemented for {self.name} or was not built"
        return self._backends[name][1](getattr(arguments, "forward", arguments))

    def _kind(self, arguments: Arguments) -> tuple[str, ...]:
        """A key for roughly one compiled kernel: the function, and dtypes and shapes without the batch dimension."""
        return (self.function, *(f"{t.dtype} {list(t.shape[1:])}" for t in tensors_of(arguments)))


def _check_no_tangent(op: str, arguments: Arguments) -> None:
    """Raise an error for a forward-mode derivative, which a kernel would ignore.

    Only a compiled function can have one here: it was traced without. Eager calls use ``_derivatives.py``.
    """
    for tensor in tensors_of(arguments):
        if not tensor.requires_grad and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"slotkernels.{op}: its kernels have no forward-mode derivatives; do not compile the function, or "
                "compile it inside the forward-mode level"
            )


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Turn autocast off: ops choose their precision themselves."""
    enabled = torch.is_autocast_enabled(device.type)  # turning it off takes 10 us
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def check_name(name: str, allow_auto: bool = False) -> str:
    """Return ``name`` if a backend has this name, else raise ValueError."""
    known = ("auto", *BACKENDS) if allow_auto else BACKENDS
    if name not in known:
        raise ValueError(f"backend={name!r} is unknown; expected one of {', '.join(known)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call in the ``with`` block that has no ``backend=`` argument.

    Blocks can be nested. A block affects only its own thread or async task. It has priority over the environment
    variable ``SLOTKERNELS_BACKEND``; ``use_backend("auto")`` undoes both. A compiled function keeps the backend of its
    first call, so put the block around the first call of the compiled function, not inside the function.

    Args:
        name: "auto", "reference" (plain PyTorch), "triton", "cpp" or "cuda"; or, for the Sinkhorn divergence of large
            sets, "keops" or "blocks".

    Raises:
        ValueError: if no backend has that name.

    Example:
        >>> import torch, slotkernels
        >>> slots, tokens = torch.randn(1, 4, 8), torch.randn(1, 16, 8)
        >>> with slotkernels.use_backend("reference"):
        ...     updates, _ = slotkernels.inverted_attention(slots, tokens)
        >>> updates.shape
        torch.Size([1, 4, 8])
    """
    token = _override.set(check_name(name, allow_auto=True))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def decomposed() -> Iterator[None]:
    """Export models that run without this package: record PyTorch's own operations instead of ops of slotkernels.

    Without this block ``torch.export`` records calls of ``torch.ops.slotkernels``, so the exported program needs this
    package to run. Exported inside the block, the program contains the operations of the backend "reference". It runs
    in C++, in ONNX Runtime, or compiled by AOTInductor. Use it for inference only: its operations have no gradient. The
    block does not change calls that are not traced.

    Example:
        >>> import torch, slotkernels
        >>> module, tokens = slotkernels.SlotAttention(num_slots=4, dim=8).eval(), torch.randn(1, 16, 8)
        >>> with torch.no_grad(), slotkernels.decomposed():
        ...     program = torch.export.export(module, (tokens, torch.randn(1, 4, 8)))
        >>> "slotkernels" in str(program.graph)
        False
    """
    token = _decomposed.set(True)
    try:
        yield
    finally:
        _decomposed.reset(token)


def is_decomposed() -> bool:
    """Whether the caller is traced inside :func:`decomposed`. Not for Dynamo, which cannot read a ContextVar."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling() and _decomposed.get()


@torch.compiler.assume_constant_result  # Dynamo cannot trace a ContextVar
def _default_backend() -> str:
    name = _override.get()
    if name is not None:
        return name
    # Faster by 1 to 3 us a call than os.environ, which raises and catches a KeyError if the name is absent.
    value = _environment.get(_ENVIRONMENT_KEY)
    return "auto" if not value else check_name(os.environ[ENVIRONMENT_VARIABLE], allow_auto=True)


def requested_backend(backend: str) -> str:
    """The backend to use: the call's argument, else that of ``use_backend``, else of the environment, else "auto"."""
    return _default_backend() if backend == "auto" else check_name(backend)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(arguments: Arguments) -> str | None:
    """The reason why Triton cannot compute the call, or None. Every op with Triton kernels checks this first."""
    if not _has_triton():
        return "triton is not installed"
    if has_float64(arguments):
        return "float64 tensors"
    device = device_of(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    if device.type == "cpu" and interpreted:
        return None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if device.type != "cuda":
        return f"tensors on {device.type} (TRITON_INTERPRET=1 runs Triton's interpreter on CPU tensors, for tests)"
    return None
