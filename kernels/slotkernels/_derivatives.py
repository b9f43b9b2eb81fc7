"""Derivatives that kernels do not have: forward mode, second and higher orders, and transforms of ``torch.func``.

A kernel computes the gradient in reverse mode only. For all other derivatives each op has a *composite* form in its
``reference.py`` or ``composite.py``: the same function in PyTorch's operations, which PyTorch differentiates in every
mode. With backend "auto" or "reference" the composite form is used

- inside ``torch.func`` (``grad``, ``jvp``, ``vmap``, …) and ``torch.autograd.forward_ad``, instead of the op;
- in a backward pass with ``create_graph=True``, instead of the op's own backward pass.

A backend that the caller names is never replaced: it raises an error.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from ._backends import without_autocast

COMPOSITE_BACKENDS = ("auto", "reference")


@torch.compiler.assume_constant_result  # while it traces, Dynamo is inside the transforms
def transformed() -> bool:
    """Whether the caller is inside a transform of ``torch.func`` or a forward-mode level."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor is batched by ``torch.vmap``, so that the host cannot read its values."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def takes_composite(op: str, backend: str) -> bool:
    """Whether this call of an op uses its composite form.

    Raises:
        RuntimeError: if it needs the composite form, but ``backend`` names another backend.
    """
    if not transformed():
        return False
    if backend not in COMPOSITE_BACKENDS:
        raise RuntimeError(no_derivatives(op, backend, "inside torch.func or forward-mode differentiation"))
    return True


def composite(function: Callable[..., Any], *args: Any) -> Any:
    """Call a composite form, with autocast off as for every backend."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    with without_autocast(device):
        return function(*args)


def differentiates_again(backend: str, grads: Iterable[Tensor | None]) -> bool:
    """Whether the present backward pass must be differentiable itself, or is inside a transform."""
    if backend not in COMPOSITE_BACKENDS:
        return False
    vectorised = torch._C._functorch.is_legacy_batchedtensor  # with is_grads_batched=True
    return torch.is_grad_enabled() or transformed() or any(g is not None and vectorised(g) for g in grads)


def composite_gradients(
    function: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the ``tensors`` that need one; the gradients are differentiable themselves.

    Args:
        function: a composite form, which returns its result or a tuple of results.
        tensors: arguments of the function.
        needs: which arguments need a gradient.
        grads: gradients of the results, None for zero.
    """
    chosen = [i for i, (tensor, need) in enumerate(zip(tensors, needs, strict=True)) if need and tensor is not None]
    used_results = [i for i, grad in enumerate(grads) if grad is not None]
    gradients: list[Tensor | None] = [None] * len(tensors)
    if not chosen or not used_results:
        return gradients

    def of_chosen(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, value in zip(chosen, values, strict=True):
            arguments[i] = value
        results = composite(function, *arguments)
        return tuple((results if isinstance(results, tuple) else (results,))[i] for i in used_results)

    _, vector_jacobian_product, *_ = torch.func.vjp(of_chosen, *(tensors[i] for i in chosen))
    for i, grad in zip(chosen, vector_jacobian_product(tuple(grads[i] for i in used_results)), strict=True):
        gradients[i] = grad
    return gradients


def refuse(op: str, remedy: str, *tensors: Tensor) -> None:
    """Raise an error if a transform differentiates one of the tensors; otherwise its derivative would silently be zero.

    (Without a transform the result requires no gradient, and PyTorch raises an error by itself.)
    """
    if transformed() and any(map(_is_followed, tensors)):
        raise RuntimeError(f"{op}: it has no derivatives; {remedy}")


def _is_followed(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while not tensor.requires_grad:
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True


def differentiable_once(backward: CustomOpDef, op: str) -> None:
    """Make the second derivative of an op raise a clear error. The last argument of ``backward`` is the backend."""

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = inputs[-1]

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(no_derivatives(op, ctx.backend, "a second time"))

    backward.register_autograd(refuse, setup_context=remember)


def no_derivatives(op: str, backend: str, where: str) -> str:
    """The message of the error for a derivative that cannot be computed."""
    what = "sets as large as these are streamed, and" if backend == "auto" else f"backend {backend!r}"
    return f"{op}: {what} cannot be differentiated {where}; backend='reference' can (for large sets, if memory allows)"
