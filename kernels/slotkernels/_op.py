"""How ops are written: the arguments of an op are one ``NamedTuple``, for the check, the kernels and the gradient.

The file of an op contains these parts, in this order::

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

:class:`Op` registers ``torch.ops.slotkernels.inverted_attention`` (and ``…_backward``) with PyTorch. The schema comes
from the annotations of ``Arguments`` and ``Results``, nested fields in order, so the list of arguments is written once.
Each backend's module defines ``inverted_attention(arguments: Arguments) -> Results`` and, for the backward pass,
``inverted_attention_backward(arguments: BackwardArguments)``. ``reference.py`` also defines the composite form, which
PyTorch can differentiate in every mode: ``@OP.composite def composite_inverted_attention(arguments: Arguments)``. The
package's ``__init__.py`` imports it before the first call, because Dynamo cannot trace an import.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import _derivatives
from ._backends import Backends, device_of, is_decomposed, requested_backend, without_autocast
from ._direct import all_contiguous, are_plain, examine, observed

A = TypeVar("A", bound=tuple[Any, ...])  # the NamedTuple of an op's arguments
R = TypeVar("R")  # a tensor, or a tuple or NamedTuple of tensors
_TENSORS = (Tensor, Tensor | None)


class Saved(NamedTuple, Generic[A, R]):
    """The tensors and settings that the forward pass saves for its gradient."""

    arguments: A  # None in place of tensors that are not kept
    results: R  # likewise
    needs: list[bool]  # whether each tensor of the arguments needs a gradient, in order
    backend: str  # the requested backend, which may be "auto"
    chosen: str | None  # the backend of the forward pass; None if a pass uses PyTorch's dispatcher
    twice: bool  # whether the gradient is differentiated itself


_saved = partial(tuple.__new__, Saved)  # in C, unlike the constructor of a NamedTuple


class Op(Backends, Generic[A, R]):
    """An operation that is registered with PyTorch, with its backends.

    Args:
        name: ``torch.ops.slotkernels.<name>``, and the name of the function in every backend's module.
        empty: returns results of the right shapes, dtypes and strides for ``arguments``; its annotations are the
            schema. PyTorch calls it on tensors without data while it compiles ("fake" implementation).
        check: raises ValueError for wrong arguments.
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
        self._results: Callable[[Any], Any] = (
            partial(tuple.__new__, returned) if hasattr(returned, "_fields") else lambda results: results
        )
        parts = tuple(get_type_hints(returned).values()) if hasattr(returned, "_fields") else ()
        self._result_names: tuple[str, ...] = getattr(returned, "_fields", ())

        def implementation(*values: Any) -> Any:
            if contiguous:
                values = tuple(map(_contiguous, values))
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
        """Check the arguments and compute the results, on ``backend`` or that of :func:`use_backend`.

        Raises:
            ValueError: if the check fails, or no backend has that name.
            RuntimeError: if the named backend does not support the call.
        """
        if self._check is not None:
            self._check(arguments)
        return self.checked(arguments, requested_backend(backend))

    def checked(self, arguments: A, backend: str) -> R:
        """As a call, for arguments that need no check, on the backend of :func:`requested_backend`."""
        if not observed():
            return self._directly(arguments, backend)
        if is_decomposed():
            return self.run("reference", arguments)
        if self._composite is not None and _derivatives.takes_composite(self.public, backend):
            with without_autocast(device_of(arguments)):
                return self._composite(arguments)
        return self._results(self._registered(*self._fields.unpack(arguments), backend))

    def apply(self, arguments: A, backend: str, chosen: str | None = None) -> R:
        """The registered op itself: no check, and ``backend`` as it is.

        Args:
            arguments: arguments of the op.
            backend: the requested backend.
            chosen: ``Saved.chosen`` in a backward pass without PyTorch's dispatcher; else None.
        """
        if chosen is not None:
            return self.run(backend, self._as_read(arguments) if self._contiguous else arguments, chosen)
        if not observed():
            return self._directly(arguments, backend)
        if is_decomposed():
            return self.run("reference", arguments)
        return self._results(self._registered(*self._fields.unpack(arguments), backend))

    def _directly(self, arguments: A, backend: str) -> R:
        """The op without PyTorch's dispatcher, unless a tensor needs the dispatcher."""
        leaves = self._fields.unpack(arguments)
        tensors = self._fields.take_tensors(leaves)
        plain, requires_grad = examine(tensors)
        if plain and not (requires_grad and torch.is_grad_enabled()):
            return self.run(backend, self._as_read(arguments) if self._contiguous else arguments)
        if plain and self._record is not None:
            return self._results(self._record((arguments, backend), *tensors))
        return self._results(self._registered(*leaves, backend))

    def _as_read(self, arguments: A) -> A:
        """The arguments with contiguous tensors."""
        leaves = self._fields.unpack(arguments)
        if all_contiguous(self._fields.take_tensors(leaves)):
            return arguments
        return self._fields.pack([_contiguous(leaf) for leaf in leaves])

    def composite(self, function: Callable[[A], Any]) -> Callable[[A], Any]:
        """Register the decorated function as the op's composite form, made of PyTorch's operations.

        It returns the op's results; the last ones may be left out if they are constant. See ``_derivatives.py`` for
        when it is used instead of the op.
        """
        self._composite = function
        return function

    def backward_op(self, empty: Callable[[Any], Any]) -> "Op[Any, Any]":
        """Register this op's backward pass, ``<name>_backward``, with the same backends.

        ``supports`` of a backend gets ``arguments.forward`` if the arguments have such a field. A second derivative
        through the backward pass raises an error.
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

        It takes a :class:`Saved` and a gradient for each result (some may be None, but not all). It returns a gradient
        for each tensor of the arguments, in order; the last ones may be left out, and those that are not needed may be
        anything. If the backward pass is differentiated itself, the composite form is used instead.

        Args:
            keep: names of the results that the gradient reads, or a function of the arguments that returns them.
            inputs: names of the tensor arguments that the gradient reads; all if None.
            constant: names of the results and tensor arguments that have no gradient.
        """
        fields, tensors, names = self._fields, self._fields.tensors, self._result_names
        read, constants = None if inputs is None else set(inputs), set(constant)
        kept_inputs = [i for i in tensors if read is None or fields.names[i] in read]
        constant_results = [i for i, name in enumerate(names) if name in constants]
        constant_inputs = [place for place, i in enumerate(tensors) if fields.names[i] in constants]
        settings = [i for i in range(len(fields.names)) if i not in tensors]
        saved_inputs, saved_settings = _taker(kept_inputs), _taker(settings)

        unknown = {*(read or ()), *constants} - {*fields.names, *names}
        if unknown:
            raise ValueError(f"{self.name}: {', '.join(sorted(unknown))}: no tensor of the arguments, no result")

        @cache
        def keeping(kept: tuple[str, ...]) -> _Keeping:
            if not set(kept) <= set(names):
                raise ValueError(f"{self.name}: keep={kept}, expected some of {names}")
            results = [i for i, name in enumerate(names) if name in kept]
            first, count = len(kept_inputs), len(kept_inputs) + len(results)  # what is saved: inputs, results, settings
            of_arguments = {i: place for place, i in enumerate(kept_inputs)}
            of_arguments |= {i: count + place for place, i in enumerate(settings)}
            of_results = {i: first + place for place, i in enumerate(results)}
            return _Keeping(
                _taker(results),
                _taker([of_arguments.get(i, -1) for i in range(len(fields.names))]),
                _taker([of_results.get(i, -1) for i in range(len(names))]),
            )

        always = keeping(() if callable(keep) else tuple(keep))

        def remember(
            ctx: Any, leaves: Sequence[Any], arguments: A, output: Any, backend: str, chosen: str | None
        ) -> None:
            results = output if isinstance(output, tuple) else (output,)
            kept = keeping(tuple(keep(arguments))) if callable(keep) else always
            ctx.save_for_backward(*saved_inputs(leaves), *kept.take_results(results))
            ctx.call = saved_settings(leaves), kept, backend, chosen
            ctx.set_materialize_grads(False)
            if constant_results:
                ctx.mark_non_differentiable(*[results[i] for i in constant_results])

        def remember_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            remember(ctx, inputs[:-1], fields.pack(inputs), output, inputs[-1], None)

        def forward(ctx: Any, call: tuple[A, str], *given: Tensor | None) -> Any:
            arguments, backend = call  # `given` are its tensors, which autograd follows
            chosen = self.choose(backend, arguments)
            output = self.run(backend, self._as_read(arguments) if self._contiguous else arguments, chosen)
            remember(ctx, fields.unpack(arguments), arguments, output, backend, chosen)
            return output

        def register(gradients: Callable[..., Iterable[Tensor | None]]) -> Callable[..., Iterable[Tensor | None]]:
            def of_tensors(
                ctx: Any, needed: Sequence[bool], grads: Sequence[Tensor | None], direct: bool
            ) -> list[Tensor | None]:
                settings, kept, backend, chosen = ctx.call
                everything = (*ctx.saved_tensors, *settings, None)
                needs = list(needed)
                for i in constant_inputs:
                    needs[i] = False
                if not direct:
                    chosen = None
                twice = chosen is None and _derivatives.differentiates_again(backend, grads)
                each: Iterable[Tensor | None]
                if twice and read is None and self._composite is not None:
                    values = kept.of_arguments(everything)
                    function, leaves = self._of_tensors(values), [values[i] for i in tensors]
                    each = _derivatives.composite_gradients(function, leaves, needs, grads)
                else:
                    arguments, results = fields.pack(kept.of_arguments(everything)), kept.of_results(everything)
                    each = gradients(_saved((arguments, self._results(results), needs, backend, chosen, twice)), *grads)
                found = [grad if need else None for grad, need in zip(each, needs)]  # noqa: B905 strict costs time
                return found if len(found) == len(needs) else found + [None] * (len(needs) - len(found))

            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                of_inputs: list[Tensor | None] = [None] * (len(fields.names) + 1)
                if _any(grads):
                    needed = [ctx.needs_input_grad[i] for i in tensors]
                    for i, grad in zip(tensors, of_tensors(ctx, needed, grads, False), strict=True):
                        of_inputs[i] = grad
                return tuple(of_inputs)

            self._definition.register_autograd(backward, setup_context=remember_registered)

            def backward_directly(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                needed = ctx.needs_input_grad[1:]
                if not _any(grads):
                    return (None,) * (1 + len(needed))
                direct = not torch.is_grad_enabled() and not observed() and are_plain(grads)
                return (None, *of_tensors(ctx, needed, grads, direct))

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_directly)}
            function: Any = type(self.function, (torch.autograd.Function,), methods)
            # the base class's apply does not look for transforms, as ``observed`` has: 3 us less
            self._record = super(torch.autograd.Function, function).apply  # type: ignore[misc]
            return gradients

        return register

    def _of_tensors(self, values: Sequence[Any]) -> Callable[..., Any]:
        """The composite form as a function of the tensors of the arguments."""
        composite = self._composite
        assert composite is not None

        def function(*tensors: Tensor | None) -> Any:
            filled = list(values)
            for i, tensor in zip(self._fields.tensors, tensors, strict=True):
                filled[i] = tensor
            return composite(self._fields.pack(filled))

        return function


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


class _Keeping(NamedTuple):
    """How to rebuild arguments and results from saved inputs, saved results, settings and a last None."""

    take_results: Callable[[Sequence[Any]], tuple[Any, ...]]  # those to save
    of_arguments: Callable[[Sequence[Any]], tuple[Any, ...]]  # the leaves, None in place of tensors that are not kept
    of_results: Callable[[Sequence[Any]], tuple[Any, ...]]  # likewise


def _taker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Values at these places of a sequence. In C if there are several, since every call runs this."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _any(grads: Sequence[Tensor | None]) -> bool:
    for grad in grads:  # a loop is faster than a generator  # noqa: SIM110
        if grad is not None:
            return True
    return False


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
        self.take_tensors = _taker(self.tensors)
        self._make, self._count = partial(tuple.__new__, kind), len(self.names)
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
        """The NamedTuple whose leaves begin at ``start``; later leaves are ignored."""
        if self._flat:
            return self._make(leaves if len(leaves) == self._count else leaves[start : start + self._count])
        return self._kind(
            *[leaves[start + at] if nested is None else nested.pack(leaves, start + at) for at, nested in self._parts]
        )
