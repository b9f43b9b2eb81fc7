"""Definitions of the field's scores, written pixel by pixel: slow and short, and without code of the package."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

VOID = 255
EXACT = 1e-9


def random_video(seed):
    """A tiny random video: gaps between ids, objects that come and go, void pixels, empty and void frames."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, (9, 7, 8)))
    pred = rng.choice([0, 3, 7, 255, 1000][: rng.integers(1, 6)], shape)
    true = rng.choice([0, 1, 2, 4, VOID][: rng.integers(1, 6)], shape)
    true[rng.random(shape[0]) < 0.2] = 0
    true[rng.random(shape[0]) < 0.1] = VOID
    if seed % 2:  # half of them follow the truth, so tracks last for several frames
        follows = rng.random(shape) < 0.8
        pred[follows] = np.array([0, 3, 7, 7, 1000, *[0] * 251])[true[follows]]
    return pred, true


def annotated(pred, true):
    """The video without frames that consist of void pixels only."""
    keep = [t for t in range(len(true)) if (true[t] != VOID).any()]
    return pred[keep], true[keep]


def close(value):
    return pytest.approx(value, abs=EXACT, rel=0, nan_ok=True)


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


def objects_of(true):
    return [int(g) for g in np.unique(true) if g not in (0, VOID)]


def iou(a, b, empty=None):
    """IoU of two masks; ``empty`` where both are empty."""
    union = np.sum(a | b)
    return np.sum(a & b) / union if union else empty


def ari(true, pred):
    keep = (true != 0) & (true != VOID)
    return adjusted_rand_score(true[keep], pred[keep]) if keep.any() else None


def masks(pred, true):
    """Masks of segments and objects, and their ids; no mask contains void pixels."""
    segments, objects, valid = [int(p) for p in np.unique(pred)], objects_of(true), true != VOID
    return [(pred == p) & valid for p in segments], [true == g for g in objects], segments, objects


def mean_iou(x, y):
    """Mean over the frames where either mask is present."""
    return mean(iou(p, g) for p, g in zip(x, y, strict=True))


def contour(mask):
    """Coordinates of the contour, by looking at the three neighbours of each pixel."""
    height, width = mask.shape
    pixels = []
    for y, x in itertools.product(range(height), range(width)):
        around = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        near = [(min(v, height - 1), min(u, width - 1)) for v, u in around]
        if any(mask[place] != mask[y, x] for place in near):
            pixels.append((y, x))
    return np.array(pixels, float).reshape(-1, 2)


def f_measure(one, two, radius):
    """F of two masks from the distances between all pixels of their contours."""
    if not len(one) or not len(two):
        return 1.0 if len(one) == len(two) else 0.0
    distance = np.sqrt(((one[:, None] - two[None]) ** 2).sum(axis=-1))
    precision, recall = (distance.min(axis=1) <= radius).mean(), (distance.min(axis=0) <= radius).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
