"""Chooses the backend that serves a call: the one asked for by name, or the fastest that can.

An operation has a table of :class:`Backends`. Adding one is a line beside the operation::

    INVERTED_ATTENTION.add("triton", "slotkernels.slot_attention.triton", supports=why_not_triton)

The module is imported at the first call that needs it, so ``import slotkernels`` needs no compiler and no GPU. It
defines a function named like the operation, which takes the operation's arguments as one ``NamedTuple``.

If a kernel cannot be built on this machine, ``auto`` warns once and takes the next backend; a backend asked for by name
raises. ``SLOTKERNELS_STRICT=1`` makes ``auto`` raise too, for tests and benchmarks.
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

# "auto" takes the first of these that supports the call.
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
_ONLY_BY_NAME = ("triton", "keops")  # on a CPU correct but slow: Triton's interpreter (1000x), KeOps' loops (10x)


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


def tensors_of(arguments: Arguments | list[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments, in order."""
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, _NESTED):
            yield from tensors_of(value)


def has_float64(arguments: Arguments | list[Any]) -> bool:
    """Whether any of the tensors is float64; a loop and no generator, for speed: every call comes here."""
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
    for value in arguments:  # a loop and no generator, for speed: every call comes here
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
        name: of the operation, for error messages.
        function: what every backend's module calls it; ``name`` if None.
        like: an operation whose backends serve this one too, such as the forward pass of a backward pass.
    """

    def __init__(self, name: str, function: str | None = None, like: "Backends | None" = None) -> None:
        self.name, self.function = name, function or name
        # fastest first
        self._backends: dict[str, tuple[str, Supports]] = {} if like is None else like._backends
        self._unbuilt: set[tuple[str, ...]] = set() if like is None else like._unbuilt  # calls without a kernel
        self._warned: set[str] = set() if like is None else like._warned  # kernels

    def add(self, backend: str, module: str, supports: Supports = _always) -> None:
        """Serve this operation by a function of ``module`` (dotted path) whenever ``supports(arguments)`` is None.

        Otherwise ``supports`` returns the reason, which the user reads when asking for this backend by name. For a
        backward pass it is asked about ``arguments.forward`` where there is such a field.
        """
        added = {**self._backends, check_name(backend): (module, supports)}
        self._backends.clear()  # and not another dictionary: the backward pass shares this one
        self._backends.update((name, added[name]) for name in BACKENDS if name in added)

    def available(self, arguments: Arguments) -> tuple[str, ...]:
        """Names of the backends that can serve the call, fastest first."""
        return tuple(name for name in BACKENDS if self._refusal(name, arguments) is None)

    def select(self, requested: str, arguments: Arguments, without: tuple[str, ...] = ()) -> str:
        """Name of the backend for this call; "auto" passes over those in ``without``.

        Raises:
            ValueError: if no backend has that name.
            RuntimeError: if the backend asked for by name cannot serve the call; the message says why.
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
        function = getattr(sys.modules.get(module), self.function, None)  # none yet while another thread imports it
        return function or getattr(importlib.import_module(module), self.function)

    def run(self, requested: str, arguments: Arguments, chosen: str | None = None) -> Any:
        """Call the selected backend's function with the arguments, with autocast off.

        Args:
            requested: "auto", or the name of a backend.
            arguments: of the operation.
            chosen: the backend to use, as :meth:`choose` returned it here or in the forward pass; None: choose now.

        Raises:
            RuntimeError: if a kernel cannot be built and the backend was asked for by name, or the mode is strict.
        """
        if forward_ad._current_level >= 0:
            _check_no_tangent(self.name, arguments)
        if _any_autocast():  # a context manager that does nothing costs time too
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
        """:meth:`select` among the backends whose kernels could be built for earlier calls like this."""
        return self.select(requested, arguments, self._without(requested, arguments) if self._unbuilt else ())

    def _without(self, requested: str, arguments: Arguments) -> tuple[str, ...]:
        """Backends that "auto" passes over because their kernels could not be built for an earlier call like this."""
        if requested != "auto":
            return ()
        kind = self._kind(arguments)
        return tuple(name for name in self._backends if (name, *kind) in self._unbuilt)

    def _note_unbuilt(self, requested: str, backend: str, arguments: Arguments, error: KernelBuildError) -> None:
        """Raise, or let later calls like this pass over the backend and warn once for each kernel."""
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
                f"slotkernels.{self.name}: {error} Backend {other!r} serves this call and others like it, more slowly; "
                f"{STRICT_VARIABLE}=1 raises instead, with the compiler's whole message.",
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
        """A key for one compiled kernel, roughly: the function, dtypes, and sizes except for that of the batch."""
        return (self.function, *(f"{t.dtype} {list(t.shape[1:])}" for t in tensors_of(arguments)))


def _check_no_tangent(op: str, arguments: Arguments) -> None:
    """Refuse a forward-mode derivative that a kernel would drop.

    Eager calls never come here with one (see ``_derivatives.py``), but a compiled function was traced without.
    """
    for tensor in tensors_of(arguments):
        if not tensor.requires_grad and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"slotkernels.{op}: its kernels have no forward-mode derivatives; do not compile the function, or "
                "compile it inside the forward-mode level"
            )


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Ops choose their precision themselves."""
    enabled = torch.is_autocast_enabled(device.type)  # only where it is on, as turning it off costs 10 us
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def check_name(name: str, allow_auto: bool = False) -> str:
    """Return ``name`` if it is a backend's, else raise ValueError."""
    known = ("auto", *BACKENDS) if allow_auto else BACKENDS
    if name not in known:
        raise ValueError(f"backend={name!r} is unknown; expected one of {', '.join(known)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use one backend for every call in the ``with`` block that does not name its own.

    Blocks nest, and each is private to its thread or async task. The block wins over the environment variable
    ``SLOTKERNELS_BACKEND``; ``"auto"`` undoes both. A compiled function keeps the backend that was in force when it was
    traced, so put the block around the first call of the compiled function, not inside it.

    Args:
        name: "auto", "reference", "triton", "cpp", "cuda", or for the Sinkhorn divergence in linear memory "keops" or
            "blocks" (plain PyTorch).

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
    """Trace every op in the ``with`` block into PyTorch's own operations, those of the backend "reference".

    ``torch.export`` otherwise records a call of ``torch.ops.slotkernels``, and the exported program needs this package
    where it runs. Traced in this block it runs without: in C++, in ONNX Runtime, or compiled by AOTInductor. For
    inference alone: the operations have no gradient of their own. Calls that nothing traces are not affected.

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
    """Whether a trace is made under :func:`decomposed`; Dynamo, which cannot read a ContextVar, keeps ops whole."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling() and _decomposed.get()


@torch.compiler.assume_constant_result  # Dynamo cannot trace a ContextVar
def _default_backend() -> str:
    name = _override.get()
    if name is not None:
        return name
    # Behind os.environ, whose look for an absent name raises and catches a KeyError: 1 to 3 us of each call.
    value = _environment.get(_ENVIRONMENT_KEY)
    return "auto" if not value else check_name(os.environ[ENVIRONMENT_VARIABLE], allow_auto=True)


def requested_backend(backend: str) -> str:
    """The backend that a call asks for: its argument, else ``use_backend``, else the environment, else "auto"."""
    return _default_backend() if backend == "auto" else check_name(backend)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not_triton(arguments: Arguments) -> str | None:
    """Why no Triton kernel can serve the call, or None; every op with such kernels checks this first."""
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
