"""Arguments and results of the backends of the Sinkhorn divergence."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """A batch of transport problems and how to solve them; ``sinkhorn_divergence`` describes the settings."""

    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    a: Tensor | None  # [B, N] weights of x, uniform if None
    b: Tensor | None  # [B, M] weights of y, uniform if None
    diameter: float | None  # where the annealing starts; None: the diagonal of a bounding box
    per_problem: bool  # one bounding box for each problem instead of one for the batch
    p: int
    blur: float
    scaling: float
    reach: float | None  # None: balanced
    debias: bool
    potentials: bool  # f and g are potentials; if False and with reach, the terms of the value (``unbalanced.py``)
    keep_x: bool  # also return the transport weights that the gradient of x needs
    keep_y: bool  # and those of y
    precision: str


class Solution(NamedTuple):
    """Values ``<a, f> + <b, g>``, potentials, and the transport weights that the backward pass reads.

    With ``reach`` and without ``potentials``, f and g are the terms of the value. The gradient of f_i with respect to
    x_i is a weighted sum of all points; row i of ``transport_x`` has the weights, those of the points of x first.
    """

    value: Tensor  # [B]
    f: Tensor  # [B, N]
    g: Tensor  # [B, M]
    transport_x: Tensor  # [B, N, N + M], empty without keep_x
    transport_y: Tensor  # [B, M, N + M], empty without keep_y


class BackwardArguments(NamedTuple):
    """Arguments of the backward pass: gradients of the results (None for zero), inputs and kept transport weights."""

    grad_value: Tensor | None  # [B]
    grad_f: Tensor | None  # [B, N]
    grad_g: Tensor | None  # [B, M]
    x: Tensor  # [B, N, D]
    y: Tensor  # [B, M, D]
    a: Tensor | None  # [B, N]
    b: Tensor | None  # [B, M]
    transport_x: Tensor | None  # [B, N, N + M], None if the gradient of x is not needed
    transport_y: Tensor | None  # [B, M, N + M], None if the gradient of y is not needed
    precision: str
