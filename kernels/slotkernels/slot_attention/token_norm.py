"""The layer norm of tokens, in the dtype of the products and without scale and shift (which the weights contain).

On a CPU the norm in float32 and a cast after it would read and write the tokens twice. Here it is once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backends import requested_backend, without_autocast
from .._checks import accumulate_dtype, check_number, check_tensor
from .._native import why_not_cpp
from .._op import Op, Saved


class Arguments(NamedTuple):
    """Arguments of a call. "Statistics" are float32, or float64 for float64 tokens."""

    tokens: Tensor  # [B, M, D]
    eps: float  # added to the variance
    dtype: torch.dtype  # dtype of the result


class Results(NamedTuple):
    """Results of a call."""

    normalised: Tensor  # [B, M, D], of mean 0 and variance 1 along D
    mean: Tensor  # [B, M] statistics
    rstd: Tensor  # [B, M] statistics, the reciprocal deviation


class BackwardArguments(NamedTuple):
    """Arguments of the backward pass."""

    grad: Tensor  # [B, M, D], dtype of the result
    tokens: Tensor  # [B, M, D]
    mean: Tensor  # [B, M]
    rstd: Tensor  # [B, M]


def _check(arguments: Arguments) -> None:
    check_tensor("token_norm", "tokens", arguments.tokens, "B M D", {})
    check_number(arguments.eps >= 0, "token_norm", "eps", arguments.eps, "a number >= 0")


def _empty_results(arguments: Arguments) -> Results:
    tokens = arguments.tokens
    statistics = accumulate_dtype(tokens.dtype)
    of_rows = [tokens.new_empty(tokens.shape[:2], dtype=statistics) for _ in range(2)]
    return Results(tokens.new_empty(tokens.shape, dtype=arguments.dtype), *of_rows)


def _empty_gradient(arguments: BackwardArguments) -> Tensor:
    return arguments.tokens.new_empty(arguments.tokens.shape)


TOKEN_NORM = Op("token_norm", _empty_results, check=_check, contiguous=True)
TOKEN_NORM.add("reference", "slotkernels.slot_attention.reference")
TOKEN_NORM.add("cpp", "slotkernels.slot_attention.cpp", why_not_cpp)
TOKEN_NORM_BACKWARD = TOKEN_NORM.backward_op(_empty_gradient)


@TOKEN_NORM.differentiable(keep=("mean", "rstd"), constant=("mean", "rstd"))
def _gradients(saved: Saved[Arguments, Results], *grads: Tensor | None) -> tuple[Tensor]:
    (grad, *_), (_, mean, rstd) = grads, saved.results
    assert grad is not None
    arguments = BackwardArguments(grad, saved.arguments.tokens, mean, rstd)
    return (TOKEN_NORM_BACKWARD.apply(arguments, saved.backend, saved.chosen),)


def normalise(tokens: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``tokens`` [B, M, D], normalised to mean 0 and variance 1 along D, in ``dtype``."""
    # `use_backend` may name a backend of inverted attention that this op does not have.
    served = requested_backend("auto") in ("auto", "cpp", "reference")
    if served and tokens.device.type == "cpu" and tokens.dtype == torch.float32 and dtype.itemsize == 2:
        return TOKEN_NORM(Arguments(tokens, eps, dtype))[0]
    with without_autocast(tokens.device):  # autocast would cast 16-bit tokens to float32 on a GPU
        return F.layer_norm(tokens, (tokens.shape[2],), eps=eps).to(dtype)
