"""Checks of arguments. Every error contains the argument, its shape and what was expected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Ranges of a temperature, by which float32 costs are divided, and of the number of Sinkhorn's iterations.
TEMPERATURES, ITERATIONS = (1e-30, 1e30), (1, 10**6)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(tensor: Tensor) -> str:
    """Dtype and shape, as they appear in error messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: str,
    sizes: dict[str, int],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check rank and dtype, and that every letter of ``shape`` (such as "B N D") has the same size in all tensors.

    ``sizes`` holds the size of each letter; the first tensor with a letter sets it. Only B and T may be zero.
    """
    letters, actual = shape.split(), tensor.shape
    if len(actual) != len(letters):
        raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {_listed(letters)}")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} is {describe(tensor)}, expected dtype {allowed}")
    for letter, size in zip(letters, actual, strict=True):
        if sizes.setdefault(letter, size) != size:
            expected = f"{_listed(letters)} with {letter} = {sizes[letter]}"
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {expected}")
        if size == 0 and letter not in ("B", "T"):
            raise ValueError(f"{op}: {name} is {describe(tensor)}, expected {_listed(letters)} with {letter} > 0")


def _listed(letters: Sequence[str]) -> str:
    return f"[{', '.join(letters)}]"


def check_same(op: str, **tensors: Tensor | None) -> None:
    """Check that the tensors share dtype and device."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} is {describe(tensor)} on {tensor.device}, "
                f"expected the dtype and device of {first_name}: {describe(first)} on {first.device}"
            )


def check_that(condition: bool, message: str) -> None:
    """Raise ValueError unless ``condition``."""
    if not condition:
        raise ValueError(message)


def check_number(fits: bool, op: str, name: str, value: float | str | None, expected: str) -> None:
    """Raise ValueError unless the value of an argument ``fits``.

    The message is formatted only if it is needed: under torch.compile the value may be symbolic and have no format.
    """
    if not fits:
        raise ValueError(f"{op}: {name}={value}, expected {expected}")


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...], or_else: str = "") -> None:
    """Raise ValueError unless ``value`` is one of the ``choices``. ``or_else`` describes other values that are allowed.

    The message is formatted only if it is needed: formatting takes longer than the rest of the check.
    """
    if value not in choices:
        others = f" or {or_else}" if or_else else ""
        raise ValueError(f"{op}: {name}={value!r}, expected one of {', '.join(choices)}{others}")


def check_range(op: str, name: str, value: float, low: float, high: float, remedy: str = "") -> None:
    """Raise ValueError unless ``low <= value <= high``. If the bounds are ints, the value must be a whole number."""
    whole = isinstance(low, int)
    if not (low <= value <= high and (not whole or value % 1 == 0)):
        kind = f"a whole number from {low} to {high}" if whole else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{op}: {name}={value}, expected {kind}{remedy and '; ' + remedy}")


def check_positive(op: str, **sizes: int) -> None:
    """Check that every size is at least 1."""
    for name, size in sizes.items():
        check_number(size >= 1, op, name, size, "at least 1")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of softmax, normalisers and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
