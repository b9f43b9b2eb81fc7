"""A drop-in for ``geomloss.SamplesLoss`` with ``loss="sinkhorn"``."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._checks import check_that, describe
from .op import make_problem, solve

# GeomLoss's names of its backends; they compute the same, so that "auto" may choose by the size of the sets.
_GEOMLOSS = dict.fromkeys(("tensorized", "online", "multiscale"), "auto")


class SamplesLoss(nn.Module):
    """Sinkhorn divergence between weighted point sets, with the signature of ``geomloss.SamplesLoss``.

    Called as ``loss(x, y)`` or ``loss(a, x, b, y)`` with points [N, D] and [M, D], or [B, N, D] and [B, M, D], and
    weights [N] and [M] (or [N, 1] …), batched likewise. Returns a scalar, or [B] for batches; with
    ``potentials=True`` the pair of dual potentials, shaped like the weights. Gradients reach points and weights. Points
    of weight 0 change nothing, whatever their coordinates. Higher derivatives are GeomLoss's; see ``docs/sinkhorn.md``.

    Args:
        loss: only "sinkhorn".
        p: cost ``|x - y|^p / p``, 1 or 2.
        blur: finest scale; the final temperature is ``blur^p``.
        reach: only None (balanced transport: both sets have the same total weight).
        diameter: start of the annealing; None takes one bounding box around the whole batch ("batch"), "problem" one
            around each of its problems.
        scaling: ratio of successive scales, in (0, 1).
        truncate: accepted and unused, as by GeomLoss's tensorized backend; so are ``kernel``, ``cluster_scale``,
            ``verbose``.
        cost: only None.
        debias: the divergence (True) or the entropic transport cost (False).
        potentials: return dual potentials instead of the value.
        backend: "auto", a slotkernels backend, or GeomLoss's "tensorized", "online" or "multiscale", all of which mean
            "auto" here: exact for all sizes, in linear memory for large sets.

    Raises:
        ValueError: if an option is not supported, or shapes do not fit.

    Example:
        >>> import torch
        >>> from slotkernels import SamplesLoss
        >>> loss = SamplesLoss("sinkhorn", p=2, blur=0.05)
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> round(loss(x, x + 1).item(), 3)
        1.0
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | str | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable | str | None = None,
        kernel: Callable | None = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_that(
            loss == "sinkhorn", f"SamplesLoss: loss={loss!r}, expected 'sinkhorn'; use geomloss for other losses"
        )
        check_that(reach is None, f"SamplesLoss: reach={reach}, expected None (balanced transport only)")
        check_that(cost is None, f"SamplesLoss: cost={cost!r}, expected None (|x - y|^p / p)")
        self.loss, self.p, self.blur, self.reach, self.diameter, self.scaling = loss, p, blur, reach, diameter, scaling
        self.truncate, self.cost, self.kernel, self.cluster_scale = truncate, cost, kernel, cluster_scale
        self.debias, self.potentials, self.verbose, self.backend = debias, potentials, verbose, backend

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of ``(x, y)`` or ``(a, x, b, y)``; see the class."""
        check_that(len(args) in (2, 4), f"SamplesLoss: {len(args)} arguments, expected (x, y) or (a, x, b, y)")
        a, x, b, y = (None, args[0], None, args[1]) if len(args) == 2 else args
        shapes = f"x {describe(x)} and y {describe(y)}"
        check_that(
            x.dim() == y.dim() and x.dim() in (2, 3), f"SamplesLoss: {shapes}, expected both [N, D] or [B, N, D]"
        )
        rows_a, rows_b = self._weights("a", a, x), self._weights("b", b, y)
        single = x.dim() == 2
        if single:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        diameter = "batch" if self.diameter is None else self.diameter
        backend = _GEOMLOSS.get(self.backend, self.backend)
        problem = make_problem(
            "SamplesLoss", x, y, rows_a, rows_b,
            p=self.p, blur=self.blur, scaling=self.scaling, diameter=diameter, debias=self.debias,
            potentials=self.potentials,
        )  # fmt: skip
        value, f, g = solve("SamplesLoss", problem, backend)
        if self.potentials:
            f, g = (t[0] if single else t for t in (f, g))
            return (f if a is None else f.view_as(a)), (g if b is None else g.view_as(b))
        return value[0] if single else value

    @staticmethod
    def _weights(name: str, weights: Tensor | None, points: Tensor) -> Tensor | None:
        """Weights as [B, N]."""
        if weights is None:
            return None
        expected = points.shape[:-1]
        fits = weights.shape in (expected, torch.Size((*expected, 1)))
        check_that(
            fits,
            f"SamplesLoss: {name} is {describe(weights)}, expected {list(expected)} for points {describe(points)}",
        )
        return weights.reshape(-1, expected[-1])
