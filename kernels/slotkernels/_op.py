"""One way to write an op: its arguments are one ``NamedTuple``, from the check to the kernel and to the gradient.

An op's file contains these parts, in this order::

    class Arguments(NamedTuple):
        q: Tensor  # [B, N, D]
        k: Tensor  # [B, M, D]
        scale: float

    class Results(NamedTuple):
        updates: Tensor  # [B, N, D]
        total: Tensor  # [B, N]

    class BackwardArguments(NamedTuple):
        grads: Cotangents  # a NamedTuple too: fields may be nested
        forward: Arguments
        total: Tensor
        needs: list[bool]

    def _check(arguments: Arguments) -> None: ...           # raises ValueError
    def _empty(arguments: Arguments) -> Results: ...         # shapes and dtypes for the compiler ("fake")
    def _empty_gradients(arguments: BackwardArguments) -> tuple[Tensor, Tensor]: ...

    OP = Op("inverted_attention", _empty, check=_check)
    OP.add("reference", "slotkernels.slot_attention.reference")
    OP.add("triton", "slotkernels.slot_attention.triton", supports=_why_not_triton)
    OP_BACKWARD = OP.backward_op(_empty_gradients)

    @OP.differentiable(keep=("total",))
    def _gradients(saved: Saved[Arguments, Results], *grads: Tensor | None) -> tuple[Tensor, ...]:
        forward = BackwardArguments(Cotangents(*grads), saved.arguments, saved.results.total, saved.needs)
        return OP_BACKWARD.apply(forward, saved.backend, saved.chosen)

    def inverted_attention(q, k, ..., backend="auto"):
        return OP(Arguments(q, k, scale), backend).updates

:class:`Op` registers ``torch.ops.slotkernels.inverted_attention`` (and ``…_backward``) with PyTorch. Its schema is read
off the annotations of ``Arguments`` and ``Results``, nested fields in order, so the list of arguments is written once.
Each backend's module defines ``inverted_attention(arguments: Arguments) -> Results`` and, for the backward pass,
``inverted_attention_backward(arguments: BackwardArguments)``. ``reference.py`` also has the form that PyTorch can
differentiate in every mode, ``@OP.composite def composite_inverted_attention(arguments: Arguments) -> Results``; the
package's ``__init__.py`` imports it, so that it is there before the first call (Dynamo cannot trace an import).
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import _derivatives
from ._backends import Backends, device_of, requested_backend, without_autocast
from ._direct import examine, observed

A = TypeVar("A", bound=tuple[Any, ...])  # the NamedTuple of an op's arguments
R = TypeVar("R")  # a tensor, or a tuple or NamedTuple of tensors

_TENSORS = (Tensor, Tensor | None)


class Saved(NamedTuple, Generic[A, R]):
    """The tensors and settings that the forward pass saves for its gradient."""

    arguments: A  # None in place of tensors that are not kept
    results: R  # likewise
    needs: list[bool]  # which tensors of the arguments need a gradient, in order
    backend: str  # that the forward pass was asked to run on
    chosen: str | None  # the one it was given to; None where the call went through PyTorch's dispatcher
    twice: bool  # whether the gradient is differentiated itself


class Op(Backends, Generic[A, R]):
    """An operation that is registered with PyTorch, with its backends.

    Args:
        name: ``torch.ops.slotkernels.<name>``, and the name of the function in every backend's module.
        empty: returns results of the right shapes, dtypes and strides for ``arguments``; its annotations are the
            schema. PyTorch calls it on tensors without data while it compiles ("fake" implementation).
        check: raises ValueError for arguments that cannot be served.
        contiguous: make every tensor contiguous before a backend takes it.
        public: name of the public function in messages about derivatives; ``name`` if None.
        backward_of: see :meth:`backward_op`.
    """

    def __init__(
        self,
        name: str,
        empty: Callable[[A], R],
        *,
        check: Callable[[A], None] | None = None,
        contiguous: bool = False,
        public: str | None = None,
        backward_of: "Op[Any, Any] | None" = None,
    ) -> None:
        super().__init__(name if backward_of is None else backward_of.name, name, like=backward_of)
        self.public = public or name
        self._empty, self._check, self._contiguous = empty, check, contiguous
        self._composite: Callable[[A], Any] | None = None
        hints = get_type_hints(empty)
        returned = hints.pop("return")
        self._fields = _Fields(*hints.values())
        self._results: Callable[[Any], Any] = getattr(returned, "_make", lambda results: results)
        parts = tuple(get_type_hints(returned).values()) if hasattr(returned, "_fields") else ()
        self._result_names: tuple[str, ...] = getattr(returned, "_fields", ())

        def implementation(*values: Any) -> Any:
            if contiguous:
                values = tuple(value.contiguous() if isinstance(value, Tensor) else value for value in values)
            return self.run(values[-1], self._fields.pack(values))

        def fake(*values: Any) -> Any:
            return self._empty(self._fields.pack(values))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        leaves = [*zip(self._fields.names, self._fields.types, strict=True), ("backend", str)]
        implementation.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(field, kind, annotation=annotation) for field, annotation in leaves],
            return_annotation=tuple.__class_getitem__(parts) if parts else returned,
        )
        self._implementation = implementation
        self._record: Any = None  # the differentiable op outside the dispatcher, a torch.autograd.Function's apply
        self._definition = torch.library.custom_op(f"slotkernels::{name}", implementation, mutates_args=())
        self._definition.register_fake(fake)
        self._registered = self._definition._opoverload

    def __call__(self, arguments: A, backend: str = "auto") -> R:
        """Check the arguments and compute the results, on ``backend`` or as :func:`use_backend` says.

        Raises:
            ValueError: if the check refuses the arguments, or no backend has that name.
            RuntimeError: if the backend asked for by name cannot serve the call.
        """
        if self._check is not None:
            self._check(arguments)
        backend = requested_backend(backend)
        if self._composite is not None and _derivatives.takes_composite(self.public, backend):
            with without_autocast(device_of(arguments)):
                return self._composite(arguments)
        return self.apply(arguments, backend)

    def apply(self, arguments: A, backend: str, chosen: str | None = None) -> R:
        """The registered op itself: no check, and ``backend`` as it is; ``chosen`` as in :meth:`Backends.run`."""
        if not observed():
            plain, requires_grad, contiguous = examine(arguments)
            ready = contiguous or not self._contiguous
            if plain and requires_grad and torch.is_grad_enabled():
                if self._record is not None:
                    leaves = self._fields.unpack(arguments)
                    return self._results(self._record(*leaves, backend, arguments if ready else None))
            elif plain and ready:
                return self._results(self.run(backend, arguments, chosen))
            elif plain:
                return self._results(self._implementation(*self._fields.unpack(arguments), backend))
        return self._results(self._registered(*self._fields.unpack(arguments), backend))

    def composite(self, function: Callable[[A], Any]) -> Callable[[A], Any]:
        """Register the decorated function as the op's composite form, made of PyTorch's operations.

        It returns the op's results; the last ones may be left out if they are constant. See ``_derivatives.py`` for
        when it takes the op's place.
        """
        self._composite = function
        return function

    def backward_op(self, empty: Callable[[Any], Any]) -> "Op[Any, Any]":
        """Register this op's backward pass, ``<name>_backward``, which the same backends serve.

        Whether a backend supports it is asked with ``arguments.forward`` where the arguments have such a field.
        A second derivative through it raises an error.
        """
        backward = Op(
            f"{self.function}_backward", empty, contiguous=self._contiguous, public=self.public, backward_of=self
        )
        _derivatives.differentiable_once(backward._definition, self.public)
        return backward

    def differentiable(
        self,
        *,
        keep: Iterable[str] | Callable[[A], Iterable[str]] = (),
        inputs: Iterable[str] | None = None,
        constant: Iterable[str] = (),
    ) -> Callable[[Callable[..., Iterable[Tensor | None]]], Callable[..., Iterable[Tensor | None]]]:
        """Register the decorated function as the op's gradient: ``gradients(saved, *grads)``.

        It takes a :class:`Saved` and a gradient for each result, None where there is none (not all are None), and
        returns one for each tensor of the arguments, in order; the last ones may be left out, and those that are not
        needed may be anything. In a backward pass that is differentiated itself, the composite form takes its place.

        Args:
            keep: names of the results that the gradient reads, or a function of the arguments that returns them.
            inputs: names of the tensor arguments that it reads; all if None.
            constant: names of the results and tensor arguments that have no gradient.
        """
        fields, tensors, names = self._fields, self._fields.tensors, self._result_names
        read, constants = None if inputs is None else set(inputs), set(constant)
        kept_inputs = [i for i in tensors if read is None or fields.names[i] in read]
        constant_results = [i for i, name in enumerate(names) if name in constants]
        always_kept = [] if callable(keep) else [i for i, name in enumerate(names) if name in set(keep)]
        varying = [(i, fields.names[i] not in constants) for i in tensors]

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            results = output if isinstance(output, tuple) else (output,)
            kept_results = always_kept
            if callable(keep):
                kept = set(keep(fields.pack(inputs)))
                kept_results = [i for i, name in enumerate(names) if name in kept]
            ctx.kept_results = kept_results
            ctx.save_for_backward(*[inputs[i] for i in kept_inputs], *[results[i] for i in kept_results])
            settings: list[Any] = list(inputs)
            for i in tensors:
                settings[i] = None
            ctx.settings = settings
            ctx.set_materialize_grads(False)
            if constant_results:
                ctx.mark_non_differentiable(*[results[i] for i in constant_results])

        def forward(ctx: Any, *values: Any) -> Any:
            inputs, arguments = values[:-1], values[-1]  # in one tuple, or None if some have to be made contiguous
            if arguments is None:
                ctx.chosen, output = None, self._implementation(*inputs)
            else:
                ctx.chosen = self.choose(inputs[-1], arguments)
                output = self.run(inputs[-1], arguments, ctx.chosen)
            remember(ctx, inputs, output)
            return output

        def register(gradients: Callable[..., Iterable[Tensor | None]]) -> Callable[..., Iterable[Tensor | None]]:
            def backward(ctx: Any, *grads: Tensor | None, chosen: str | None = None) -> tuple[Tensor | None, ...]:
                of_inputs: list[Tensor | None] = [None] * (len(fields.names) + 1)
                given = [grad for grad in grads if grad is not None]
                if not given:
                    return tuple(of_inputs)
                values, results = list(ctx.settings), [None] * len(names)
                saved_tensors = ctx.saved_tensors
                for i, tensor in zip(kept_inputs, saved_tensors, strict=False):
                    values[i] = tensor
                for i, tensor in zip(ctx.kept_results, saved_tensors[len(kept_inputs) :], strict=True):
                    results[i] = tensor
                needed, backend = ctx.needs_input_grad, values[-1]
                needs = [needed[i] and varies for i, varies in varying]
                twice = _derivatives.differentiates_again(backend, given)
                each: Iterable[Tensor | None]
                if twice and read is None and self._composite is not None:
                    function, leaves = self._of_tensors(values), [values[i] for i in tensors]
                    each = _derivatives.composite_gradients(function, leaves, needs, grads)
                else:
                    saved = Saved(fields.pack(values), self._results(results), needs, backend, chosen, twice)
                    each = gradients(saved, *grads)
                for i, need, grad in zip(tensors, needs, each, strict=False):
                    of_inputs[i] = grad if need else None
                return tuple(of_inputs)

            self._definition.register_autograd(backward, setup_context=remember)

            def backward_directly(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return (*backward(ctx, *grads, chosen=ctx.chosen), None)

            parts = {"forward": staticmethod(forward), "backward": staticmethod(backward_directly)}
            function: Any = type(self.function, (torch.autograd.Function,), parts)
            # Function.apply of the base class: without its look for transforms, which ``observed`` has taken, 3 us less
            self._record = super(torch.autograd.Function, function).apply  # type: ignore[misc]
            return gradients

        return register

    def _of_tensors(self, values: list[Any]) -> Callable[..., Any]:
        """The composite form as a function of the tensors among the arguments alone."""
        composite = self._composite
        assert composite is not None

        def function(*tensors: Tensor | None) -> Any:
            filled = list(values)
            for i, tensor in zip(self._fields.tensors, tensors, strict=True):
                filled[i] = tensor
            return composite(self._fields.pack(filled))

        return function


class _Fields:
    """The leaves of a NamedTuple of arguments, which may hold others: ``forward: Arguments`` is ``forward_q``, …"""

    def __init__(self, kind: type[Any]) -> None:
        self._kind = kind
        self.names: list[str] = []
        self.types: list[Any] = []
        self._parts: list[tuple[int, _Fields | None]] = []  # where each field begins, and the leaves of a nested one
        for name, annotation in get_type_hints(kind).items():
            nested = _Fields(annotation) if hasattr(annotation, "_fields") else None
            self._parts.append((len(self.names), nested))
            self.names += [name] if nested is None else [f"{name}_{leaf}" for leaf in nested.names]
            self.types += [annotation] if nested is None else nested.types
        self.tensors = [i for i, annotation in enumerate(self.types) if annotation in _TENSORS]
        self._flat = len(self._parts) == len(self.names) and not any(nested for _, nested in self._parts)

    def unpack(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The leaves of ``arguments``, in order."""
        if self._flat:
            return arguments
        leaves: tuple[Any, ...] = ()
        for value, (_, nested) in zip(arguments, self._parts, strict=True):
            leaves += (value,) if nested is None else nested.unpack(value)
        return leaves

    def pack(self, leaves: Sequence[Any], start: int = 0) -> Any:
        """The NamedTuple whose leaves begin at ``start``; what follows them is left out."""
        if self._flat:
            return self._kind(*leaves[start : start + len(self.names)])
        return self._kind(
            *[leaves[start + at] if nested is None else nested.pack(leaves, start + at) for at, nested in self._parts]
        )
