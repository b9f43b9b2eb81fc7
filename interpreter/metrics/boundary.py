"""Boundary measure F of DAVIS (Perazzi et al. 2016, section 5): precision and recall of contours within a tolerance."""

import math

import numpy as np

from interpreter.metrics.contingency import NO_SEGMENT, ratio

TOLERANCE = 0.008
"""Tolerance of the official evaluation, as a fraction of the frame's diagonal."""

GROUP = 8
"""Number of ids in one byte image, a bit for each. Their contours are computed and widened together."""


def tolerance_in_pixels(size: tuple[int, int]) -> int:
    """Radius of the disk that widens contours: 0.008 of the diagonal, rounded up; 5 at 336×504, 8 at 480×854."""
    return math.ceil(TOLERANCE * math.hypot(*size))


def boundary_f(
    pred: np.ndarray, true: np.ndarray, segments: np.ndarray, objects: np.ndarray, *, void: int = 255
) -> np.ndarray:
    """F of every pair of segment and object in every frame.

    The contour of a mask is one pixel wide: a pixel is on it if its mask value differs from that of its neighbour to
    the right, below, or below right (at the edge of the image, of the existing ones). Precision is the share of the
    segment's contour within the tolerance (Euclidean, :func:`tolerance_in_pixels`) of the object's contour. Recall is
    the share of the object's contour within the tolerance of the segment's. F is their harmonic mean. If both masks
    have no contour, F = 1; if only one has, F = 0. Void pixels belong to no mask.

    Args:
        pred: [T, H, W] integer ids of predicted segments, 0..65535.
        true: [T, H, W] integer ids of true objects, 0..65535.
        segments: [P] ids to evaluate; an id that does not occur is an empty segment.
        objects: [G] ids to evaluate.
        void: id in ``true`` of pixels that were not annotated.

    Returns:
        float64 [T, P, G] in [0, 1].
    """
    radius = tolerance_in_pixels(pred.shape[1:])
    segment_bits, object_bits = _bit_tables(segments), _bit_tables(objects, void)
    scores = np.empty((len(pred), len(segments), len(objects)))
    for t, (p, g) in enumerate(zip(pred, true, strict=True)):
        known = g != void
        of_pred = [_contours(table[p] * known) for table in segment_bits]
        of_true = [_contours(table[g]) for table in object_bits]
        hits_pred, lengths_pred = _count(of_pred, [_widen(contour, radius) for contour in of_true])
        hits_true, lengths_true = _count(of_true, [_widen(contour, radius) for contour in of_pred])
        pairs = np.s_[: len(segments), : len(objects)]
        scores[t] = _f(hits_pred[pairs], hits_true.T[pairs], lengths_pred[pairs[0], None], lengths_true[pairs[1]])
    return scores


def _f(hits_pred: np.ndarray, hits_true: np.ndarray, lengths_pred: np.ndarray, lengths_true: np.ndarray) -> np.ndarray:
    """F of each pair, from the numbers of contour pixels near the other contour and the lengths of the contours."""
    precision, recall = ratio(hits_pred, lengths_pred), ratio(hits_true, lengths_true)
    f = np.nan_to_num(ratio(2 * precision * recall, precision + recall))
    return np.where((lengths_pred == 0) & (lengths_true == 0), 1.0, f)


def _bit_tables(ids: np.ndarray, void: int | None = None) -> list[np.ndarray]:
    """For each group of ids, a table from id to a byte with the bit of the id. 0 for void and ids of other groups."""
    tables = []
    for start in range(0, max(1, len(ids)), GROUP):
        group = ids[start : start + GROUP]
        table = np.zeros(NO_SEGMENT + 1, np.uint8)
        table[group] = 1 << np.arange(len(group))
        if void is not None:
            table[void] = 0
        tables.append(table)
    return tables


def _contours(bits: np.ndarray) -> np.ndarray:
    """Pixels whose 2×2 block (itself, right, below, below right) is partly in the mask, for each bit of [H, W]."""
    block = np.pad(bits, ((0, 1), (0, 1)), mode="edge")
    across_any, across_all = block[:, :-1] | block[:, 1:], block[:, :-1] & block[:, 1:]
    return (across_any[:-1] | across_any[1:]) & ~(across_all[:-1] & across_all[1:])


def _widen(bits: np.ndarray, radius: int) -> np.ndarray:
    """Dilate every bit of [H, W] by a disk: rows of the disk from its tips inwards, each wider than the one before."""
    row, out, reach = bits.copy(), np.zeros_like(bits), 0
    for dy in range(radius, -1, -1):
        for dx in range(reach + 1, math.isqrt(radius**2 - dy**2) + 1):
            row[:, dx:] |= bits[:, :-dx]
            row[:, :-dx] |= bits[:, dx:]
            reach = dx
        if dy == 0:
            out |= row
        else:
            out[dy:] |= row[:-dy]
            out[:-dy] |= row[dy:]
    return out


def _count(contours: list[np.ndarray], near: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of contour pixels: near each contour of the other side [8·groups, 8·groups of the other], and in all."""
    hits, lengths = [], []
    for contour in contours:
        at = np.flatnonzero(contour != 0)  # bool: three times as fast as bytes
        of = _unpack(contour.ravel()[at])
        hits.append(np.concatenate([of.T @ _unpack(other.ravel()[at]) for other in near], axis=1))
        lengths.append(of.sum(axis=0))
    return np.concatenate(hits), np.concatenate(lengths)


def _unpack(values: np.ndarray) -> np.ndarray:
    """Bits of bytes [n] as float64 [n, 8], lowest first. Products of such matrices count exactly."""
    return np.unpackbits(values[:, None], axis=1, bitorder="little").astype(np.float64)
