"""Comparison of an op with its oracle, in value and gradient; a failure names the tensor that differs."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]


def assert_matches_oracle(
    function: Callable[..., Iterable[Tensor | None]],
    oracle: Callable[..., Iterable[Tensor | None]],
    inputs: Mapping[str, Tensor],
    outputs: Iterable[str],
    tolerance: float | Callable[[str, Tensor], float],
    *,
    cotangents: Mapping[str, Tensor] | None = None,
    float64: bool = True,
) -> Tensors:
    """Check the results of ``function(**inputs)``, and the gradients of all inputs that require one.

    Args:
        function: the function under test.
        oracle: a slow and plain implementation of it.
        inputs: the arguments of both, by name.
        outputs: names of the results, in order.
        tolerance: of errors relative to a tensor's largest value; or a function of a tensor's name ("updates",
            "gradient of k") and the tensor itself.
        cotangents: of some results, by name; random ones for all floating results if None.
        float64: give the oracle copies of the inputs in float64 instead of the inputs themselves.

    Returns:
        results and gradients of ``function``, by name.
    """
    names = list(outputs)
    results = dict(zip(names, function(**inputs), strict=True))
    if cotangents is None:
        differentiable = {name: t for name, t in results.items() if t is not None and t.requires_grad}
        cotangents = {name: torch.randn_like(result) for name, result in differentiable.items()}
    of_oracle = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    of_oracle = of_oracle if float64 else dict(inputs)
    expected = dict(zip(names, oracle(**of_oracle), strict=True))
    actual = results | _gradients(results, inputs, cotangents)
    expected |= _gradients(expected, of_oracle, cotangents)
    for name, tensor in actual.items():
        if isinstance(tolerance, float):
            assert_close(name, tensor, expected[name], tolerance)
        else:
            assert_close(name, tensor, expected[name], 0.0 if tensor is None else tolerance(name, tensor))
    return actual


def assert_close(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Check shape and error, relative to the largest value of ``expected`` (1e-3 at least)."""
    if actual is None or expected is None:
        assert actual is expected, f"{name}: {'missing' if actual is None else 'not expected'}"
        return
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, expected {list(expected.shape)}"
    if not actual.numel():
        return
    difference = (actual.detach().double() - expected.detach().double()).abs()
    error = (difference / expected.detach().double().abs().max().clamp_min(1e-3)).max()
    if not error <= tolerance:
        where = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), actual.shape))
        mismatch = f"{actual[where].item():.6g} instead of {expected[where].item():.6g}"
        raise AssertionError(
            f"{name}: relative error {error:.2g}, expected {tolerance:.2g}; {mismatch} at {list(where)}"
        )


def _gradients(
    results: Mapping[str, Tensor | None], inputs: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]
) -> Tensors:
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    if not leaves or not cotangents:
        return {}
    used = [result for name in cotangents if (result := results[name]) is not None]
    used_cotangents = [cotangent.to(result.dtype) for cotangent, result in zip(cotangents.values(), used, strict=True)]
    grads = torch.autograd.grad(used, list(leaves.values()), used_cotangents, allow_unused=True)
    gradients: Tensors = {}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad is None or grad.dtype == leaf.dtype, f"gradient of {name}: {grad.dtype}, expected {leaf.dtype}"
        gradients[f"gradient of {name}"] = grad
    return gradients


def assert_compiles(
    loss: Callable[..., Tensor], *leaves: Tensor, rtol: float | None = None, atol: float | None = None
) -> None:
    """Check that ``loss(*leaves)`` is one graph of ``torch.compile`` and keeps its value and gradients.

    Args:
        loss: a scalar function.
        leaves: its arguments.
        rtol, atol: as for ``torch.testing.assert_close``.
    """
    expected = loss(*leaves)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    gradients = (torch.autograd.grad(value, leaves) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)
