"""The end of a broadcast decoder: one logit for each slot and patch, softmax over slots, and the mixture of the slots.

Both results are computed while the hidden layer is read once, and so is the gradient. Besides the hidden layer and its
gradient no tensor of this size is stored; plain PyTorch would store the product of masks and hidden layer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._backends import why_not_triton
from .._checks import FLOATS, accumulate_dtype, check_tensor, describe
from .._op import Op, Saved

MAX_DIM = 2048  # width of a row that the Triton kernels hold in registers
MAX_SLOTS = 256  # logits of a patch that they hold there


class Arguments(NamedTuple):
    """Arguments of a call."""

    hidden: Tensor  # [B, K, M, H]
    weight: Tensor  # [H]
    bias: Tensor  # [] or [1]
    valid: Tensor | None  # [B, K] bool


class Mixture(NamedTuple):
    """Results of ``mix_slots``."""

    mixed: Tensor  # [B, M, H], dtype of hidden
    masks: Tensor  # [B, M, K], float32, or float64 for float64


class Cotangents(NamedTuple):
    """Gradients of both results; not both are None."""

    mixed: Tensor | None  # [B, M, H]
    masks: Tensor | None  # [B, M, K]


class BackwardArguments(NamedTuple):
    """Arguments of the backward pass. The bias is missing: it adds the same to all logits, and changes no softmax."""

    grads: Cotangents
    hidden: Tensor  # [B, K, M, H]
    weight: Tensor  # [H]
    valid: Tensor | None  # [B, K] bool
    masks: Tensor  # [B, M, K]


class Gradients(NamedTuple):
    """Gradients of the arguments that have one."""

    hidden: Tensor  # [B, K, M, H]
    weight: Tensor  # [H] in the dtype of the masks


def _check(arguments: Arguments) -> None:
    hidden, weight, bias, valid = arguments
    sizes: dict[str, int] = {}
    check_tensor("mix_slots", "hidden", hidden, "B K M H", sizes)
    check_tensor("mix_slots", "weight", weight, "H", sizes)
    if tuple(bias.shape) not in ((), (1,)) or bias.dtype not in FLOATS:
        raise ValueError(f"mix_slots: bias is {describe(bias)}, expected [] or [1] of a floating dtype")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if (tensor.dtype == torch.float64) != (hidden.dtype == torch.float64):
            expected = "float64" if hidden.dtype == torch.float64 else "float32, bfloat16 or float16"
            raise ValueError(
                f"mix_slots: {name} is {describe(tensor)}, expected dtype {expected} for hidden {describe(hidden)}"
            )
    if valid is not None:
        check_tensor("mix_slots", "valid", valid, "B K", sizes, dtypes=(torch.bool,))
    for name, other in (("weight", weight), ("bias", bias), ("valid", valid)):
        if other is not None and other.device != hidden.device:
            raise ValueError(f"mix_slots: {name} is on {other.device}, expected the device of hidden: {hidden.device}")


def _empty(arguments: Arguments) -> Mixture:
    hidden = arguments.hidden
    batch, slots, patches, dim = hidden.shape
    masks = hidden.new_empty(batch, patches, slots, dtype=accumulate_dtype(hidden.dtype))
    return Mixture(hidden.new_empty(batch, patches, dim), masks)


def _empty_gradients(arguments: BackwardArguments) -> Gradients:
    hidden = arguments.hidden
    return Gradients(hidden.new_empty(hidden.shape), arguments.masks.new_empty(hidden.shape[-1]))


def _why_not_triton(arguments: Arguments | BackwardArguments) -> str | None:
    _, slots, _, dim = arguments.hidden.shape
    if dim > MAX_DIM:
        return f"width {dim}, at most {MAX_DIM}"
    return f"{slots} slots, at most {MAX_SLOTS}" if slots > MAX_SLOTS else why_not_triton(arguments)


# Contiguous: the kernels read rows one after the other, and results have the strides of the empty ones.
MIX_SLOTS = Op("mix_slots", _empty, check=_check, contiguous=True)
MIX_SLOTS.add("triton", "slotkernels.mixing.triton", supports=_why_not_triton)
MIX_SLOTS.add("reference", "slotkernels.mixing.reference")
MIX_SLOTS_BACKWARD = MIX_SLOTS.backward_op(_empty_gradients)


@MIX_SLOTS.differentiable(keep=("masks",))
def _gradients(saved: Saved[Arguments, Mixture], *grads: Tensor | None) -> list[Tensor | None]:
    hidden, weight, bias, valid = saved.arguments
    arguments = BackwardArguments(Cotangents(*grads), hidden, weight, valid, saved.results.masks)
    of_hidden, of_weight = MIX_SLOTS_BACKWARD.apply(arguments, saved.backend, saved.chosen)
    return [of_hidden, of_weight.to(weight.dtype), torch.zeros_like(bias)]


def mix_slots(
    hidden: Tensor,  # [B, K, M, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [] or [1]
    valid: Tensor | None = None,  # [B, K]
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax over the slots and weighted mean of the slots at every patch: the end of a broadcast decoder.

    For each patch m (Watters et al. 2019; Seitzer et al. 2023)::

        α[k, m] = hidden[k, m] · weight + bias
        masks[m, k] = softmax over the valid k of α[k, m]
        mixed[m] = Σ_k masks[m, k] hidden[k, m]

    Published decoders apply a last linear layer to every slot and mix the results. Masks sum to 1, so you may apply the
    layer to the mixture instead: ``Σ m (W h + b) = W (Σ m h) + b``. This needs K times fewer products, and no tensor of
    slots times patches times features.

    Args:
        hidden: [B, K, M, H], the last hidden layer for each slot and patch; float32, float64, bfloat16 or float16. It
            is copied if it is not contiguous.
        weight: [H], weight of the linear layer that gives α; any of these dtypes (float64 only with float64).
        bias: [] or [1], bias of that layer. It adds the same number to all logits of a patch, so the results do not
            depend on it and its gradient is 0.
        valid: [B, K] bool, False for slots to leave out. Their mask is 0; their hidden layer is not read, may contain
            anything, and gets the gradient 0. If no slot of a sample is valid, masks, mixture and gradients are 0.
        backend: "auto", or the name of a backend (see :func:`slotkernels.use_backend`).

    Returns:
        mixed [B, M, H] in the dtype of ``hidden``, and masks [B, M, K] in float32 (float64 for float64). Differentiable
        in hidden, weight and bias.

    Raises:
        ValueError: if shapes, dtypes or devices disagree.
        RuntimeError: if the named backend does not support the call.

    Example:
        >>> import torch, slotkernels
        >>> hidden = torch.tensor([[[[0.0, 1.0]], [[2.0, 1.0]]]])  # two slots at one patch
        >>> mixed, masks = slotkernels.mix_slots(hidden, torch.tensor([1.0, 0.0]), torch.tensor(0.5))
        >>> mixed, masks
        (tensor([[[1.7616, 1.0000]]]), tensor([[[0.1192, 0.8808]]]))
    """
    return MIX_SLOTS(Arguments(hidden, weight, bias, valid), backend)


def bytes_moved(
    batch: int, slots: int, patches: int, dim: int, itemsize: int = 4, *, backward: bool = False, masks: bool = True
) -> int:
    """Least memory traffic: hidden layer, mixture and float32 masks once; backward, the gradients of all three too.

    Args:
        batch: B.
        slots: K.
        patches: M.
        dim: H.
        itemsize: bytes of an element of ``hidden``.
        backward: count the backward pass instead.
        masks: whether the masks have a gradient too.
    """
    pairs, rows = batch * slots * patches, batch * patches
    if not backward:
        return (pairs + rows) * dim * itemsize + 4 * (pairs + dim)
    return (2 * pairs + rows) * dim * itemsize + 4 * (pairs * (2 if masks else 1) + 2 * dim)


def flops(batch: int, slots: int, patches: int, dim: int, *, backward: bool = False) -> int:
    """Operations on the hidden layer: two products forward, and twice as many backward."""
    return batch * slots * patches * dim * (8 if backward else 4)
