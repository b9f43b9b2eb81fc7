"""Optimal transport and matching: ours, and GeomLoss, POT, SciPy and scikit-learn."""

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from slotkernels import SamplesLoss, cluster_slots, match_slots, sinkhorn_divergence, sinkhorn_plan

from profiling.comparable.peers import Numbers, Peers

OPTIONS = list(itertools.product((1, 2), (0.05, 0.3), (0.5, 0.9), (True, False), (None, 2.0), (True, False)))
"""p, blur, scaling, debias, diameter, weights given."""
UNBALANCED = list(itertools.product((1, 2), (0.05, 0.3), (0.5, 0.9), (0.3, 2.0), (True, False)))
"""p, blur, scaling, reach, weights given."""
LINKAGES = ("average", "complete", "single")


def _clouds(case: int) -> list[torch.Tensor]:
    """x [B, N, D], y [B, M, D] and their weights."""
    rng = np.random.default_rng(case)
    n, m, d = rng.integers((3, 3, 1), (20, 20, 6))
    weights = [rng.random((2, k)) + 0.1 for k in (n, m)]
    arrays = [rng.random((2, n, d)), rng.random((2, m, d)), *(w / w.sum(1, keepdims=True) for w in weights)]
    return [torch.from_numpy(array).requires_grad_() for array in arrays]


def _divergence(loss: Any, case: int) -> np.ndarray:
    x, y, a, b = _clouds(case)
    p, blur, scaling, debias, diameter, weighted = OPTIONS[case]
    compute = loss("sinkhorn", p=p, blur=blur, scaling=scaling, debias=debias, diameter=diameter)
    tensors = (a, x, b, y) if weighted else (x, y)
    values = compute(*tensors)
    gradients = torch.autograd.grad(values.sum(), tensors)
    return torch.cat([t.detach().flatten() for t in (values, *gradients)]).numpy()


def geomloss_ours(case: int) -> np.ndarray:
    """Values and gradients of the Sinkhorn divergence."""
    return _divergence(SamplesLoss, case)


def geomloss(peers: Peers) -> tuple[str, Numbers]:
    """GeomLoss's, dense."""
    package, version = peers.package("geomloss", "geomloss")

    def tensorized(*arguments: Any, **options: Any) -> Any:
        return package.SamplesLoss(*arguments, backend="tensorized", **options)

    return version, lambda case: _divergence(tensorized, case)


def _unbalanced(compute: Any, case: int) -> np.ndarray:
    """Values and gradients; sets of different mass where weights are given."""
    x, y, a, b = _clouds(case)
    p, blur, scaling, reach, weighted = UNBALANCED[case]
    weights = (2.5 * a, b) if weighted else ()
    values = compute(x, y, weights, p=p, blur=blur, scaling=scaling, reach=reach)
    gradients = torch.autograd.grad(values.sum(), (x, y, a, b) if weighted else (x, y))
    return torch.cat([t.detach().flatten() for t in (values, *gradients)]).numpy()


def reach_ours(case: int) -> np.ndarray:
    """The unbalanced Sinkhorn divergence."""
    return _unbalanced(lambda x, y, weights, **options: sinkhorn_divergence(x, y, *weights, **options), case)


def geomloss_reach(peers: Peers) -> tuple[str, Numbers]:
    """GeomLoss's with ``reach``, dense."""
    package, version = peers.package("geomloss", "geomloss")

    def compute(x: torch.Tensor, y: torch.Tensor, weights: tuple[torch.Tensor, ...], **options: Any) -> Any:
        loss = package.SamplesLoss("sinkhorn", backend="tensorized", **options)
        return loss(weights[0], x, weights[1], y) if weights else loss(x, y)

    return version, lambda case: _unbalanced(compute, case)


def _problem(case: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Weights a, b, costs, and temperature."""
    rng = np.random.default_rng(case)
    n, m = rng.integers(3, 40, 2)
    a, b = rng.random(n) + 0.1, rng.random(m) + 0.1
    return a / a.sum(), b / b.sum(), rng.random((n, m)), float(rng.choice([0.05, 0.1, 0.5]))


def pot_ours(case: int) -> np.ndarray:
    """The converged plan."""
    a, b, cost, eps = _problem(case)
    tensors = (torch.from_numpy(t)[None] for t in (cost, a, b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a tolerance that rounding does not allow
        return sinkhorn_plan(*tensors, eps=eps, iterations=3000).numpy().ravel()


def pot(peers: Peers) -> tuple[str, Numbers]:
    """POT's sinkhorn in the log domain."""
    package, version = peers.package("ot", "POT")

    def numbers(case: int) -> np.ndarray:
        a, b, cost, eps = _problem(case)
        options = {"method": "sinkhorn_log", "numItermax": 3000, "stopThr": 1e-15, "warn": False}
        return np.asarray(package.sinkhorn(a, b, cost, eps, **options)).ravel()

    return version, numbers


def _squares(case: int) -> np.ndarray:
    """Similarities of 50 problems, [50, P, P]."""
    rng = np.random.default_rng(case)
    side = int(rng.integers(1, 6))
    return rng.standard_normal((50, side, side))


def matching_ours(case: int) -> np.ndarray:
    """The columns matched with each row."""
    return match_slots(torch.from_numpy(_squares(case))).numpy().astype(np.float64).ravel()


def scipy_matching(peers: Peers) -> tuple[str, Numbers]:
    """SciPy's linear_sum_assignment."""
    package, version = peers.package("scipy.optimize", "scipy")

    def numbers(case: int) -> np.ndarray:
        pairs = [package.linear_sum_assignment(square, maximize=True)[1] for square in _squares(case)]
        return np.concatenate(pairs).astype(np.float64)

    return version, numbers


def _slots(case: int) -> tuple[np.ndarray, float, str]:
    rng = np.random.default_rng(case)
    centres = rng.standard_normal((4, 6))
    slots = centres[rng.integers(0, 4, 12)] + 0.4 * rng.standard_normal((12, 6))
    return slots, float(rng.choice([0.05, 0.2, 0.5])), LINKAGES[case % 3]


def _together(labels: np.ndarray) -> np.ndarray:
    """Which pairs are in one cluster."""
    return (labels[:, None] == labels).astype(np.float64).ravel()


def clustering_ours(case: int) -> np.ndarray:
    """Pairs of slots in one cluster."""
    slots, threshold, linkage = _slots(case)
    labels, _ = cluster_slots(torch.from_numpy(slots)[None], threshold, linkage=linkage)
    return _together(labels[0].numpy())


def scikit_clustering(peers: Peers) -> tuple[str, Numbers]:
    """scikit-learn's agglomerative clustering of cosine distances."""
    package, version = peers.package("sklearn.cluster", "scikit-learn")

    def numbers(case: int) -> np.ndarray:
        slots, threshold, linkage = _slots(case)
        options = {"metric": "cosine", "linkage": linkage, "distance_threshold": threshold, "n_clusters": None}
        return _together(package.AgglomerativeClustering(**options).fit_predict(slots))

    return version, numbers
