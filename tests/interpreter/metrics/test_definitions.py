"""Every metric against a second implementation: scikit-learn, or definitions written pixel by pixel."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from interpreter import metrics
from interpreter.metrics.ari import ari_per_frame, ari_per_video
from interpreter.metrics.boundary import boundary_f, tolerance_in_pixels
from interpreter.metrics.contingency import contingency
from interpreter.metrics.miou import iou_per_object, miou_per_frame
from interpreter.metrics.protocols import TRACKING

from .oracles import (
    EXACT,
    VOID,
    annotated,
    ari,
    close,
    contour,
    f_measure,
    iou,
    masks,
    mean,
    mean_iou,
    objects_of,
    random_video,
)

cases = pytest.mark.parametrize("seed", range(200))
ALL = metrics.Protocol("all", "", ("miou_video", "jf", "j", "f", *TRACKING, "mbo_frame", "mbo_video"), "", "")


def pairings(rows, columns):
    """Every one-to-one pairing of as many as possible."""
    if rows >= columns:
        return [list(zip(p, range(columns), strict=True)) for p in itertools.permutations(range(rows), columns)]
    return [list(zip(range(rows), p, strict=True)) for p in itertools.permutations(range(columns), rows)]


def best_pairing(score, columns):
    return max(pairings(len(score), columns), key=lambda pairs: sum(score[r][c] for r, c in pairs))


def video_miou(pred, true, matching):
    """IoU of each object under every best pairing: a list of acceptable answers (ties have several)."""
    a, b, _, _ = masks(pred, true)
    of_pair = {"frame-mean": mean_iou, "spatio-temporal": lambda x, y: iou(x, y, 0)}[matching]
    score = [[of_pair(x, y) for y in b] for x in a]
    options = pairings(len(a), len(b))
    totals = [sum(score[r][c] for r, c in pairs) for pairs in options]
    answers = []
    for pairs, total in zip(options, totals, strict=True):
        if total > max(totals) - 1e-12:
            scores = dict.fromkeys(range(len(b)), 0.0)
            scores |= {c: mean_iou(a[r], b[c]) for r, c in pairs}
            answers.append([scores[c] for c in range(len(b))])
    return answers


def frame_miou(pred, true):
    frames = []
    for p, t in zip(pred, true, strict=True):
        a, b, _, _ = masks(p, t)
        if b:
            score = [[iou(x, y, 0) for y in b] for x in a]
            frames.append(sum(score[r][c] for r, c in best_pairing(score, len(b))) / len(b))
    return mean(frames)


def mbo(pred, true):
    a, b, _, _ = masks(pred, true)
    return mean(max(iou(x, y, 0) for x in a) for y in b)


def switches_and_fragments(pred, true):
    """For each object: identity switches, fragmentations, steps between the frames that show it."""
    a, b, _, _ = masks(pred, true)
    rows = []
    for y in b:
        current, switches, history = None, 0, []
        for t in range(len(true)):
            if y[t].any():
                overlaps = [iou(x[t], y[t], 0) for x in a]
                if current is None or overlaps[current] < max(overlaps):
                    switches += current is not None
                    current = overlaps.index(max(overlaps))
                history.append("#" if max(overlaps) >= 0.5 else ".")
        runs = [run for run in "".join(history).split(".") if run]
        rows.append((switches, max(0, len(runs) - 1), len(history) - 1))
    return rows


@cases
def test_fg_ari_is_that_of_scikit_learn(seed):
    pred, true = random_video(seed)
    frames = mean(ari(t, p) for p, t in zip(pred, true, strict=True))
    whole = ari(true, pred)
    table = contingency(pred, true)
    assert ari_per_frame(table) == close(frames)
    assert ari_per_video(table) == close(math.nan if whole is None else whole)


@cases
def test_miou_is_that_of_trying_every_pairing(seed):
    pred, true = random_video(seed)
    table = contingency(pred, true)
    assert miou_per_frame(table) == close(frame_miou(pred, true))
    for matching in ("frame-mean", "spatio-temporal"):
        scores = iou_per_object(table, matching)
        assert any(scores == close(answer) for answer in video_miou(pred, true, matching))


@cases
def test_mbo_and_tracks_are_those_of_their_definitions(seed):
    pred, true = annotated(*random_video(seed))
    if not len(true):
        return
    scores = metrics.score_video(ALL, pred, true)
    assert scores["mbo_video"] == close(mbo(pred, true))
    frames = [mbo(p[None], t[None]) for p, t in zip(pred, true, strict=True) if objects_of(t)]
    assert scores["mbo_frame"] == close(mean(frames))
    tracks = switches_and_fragments(pred, true)
    assert scores["identity_switches"] == [switches for switches, _, _ in tracks]
    assert scores["fragmentations"] == [fragments for _, fragments, _ in tracks]
    rates = [100 * switches / steps if steps else math.nan for switches, _, steps in tracks]
    assert scores["identity_switches_per_100"] == close(rates)
    rates = [100 * fragments / steps if steps else math.nan for _, fragments, steps in tracks]
    assert scores["fragmentations_per_100"] == close(rates)


@cases
def test_boundary_measure_is_that_of_distances_between_contours(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(2, 16, 2)
    pred = rng.integers(0, 10, (2, -(-height // 4), -(-width // 4))).repeat(4, 1).repeat(4, 2)[:, :height, :width]
    true = np.roll(pred, rng.integers(-2, 3, 2), axis=(1, 2)) % 4
    true[rng.random(true.shape) < 0.03] = VOID
    segments, objects = np.arange(10), np.array([1, 2, 3])
    scores = boundary_f(pred, true, segments, objects)
    valid = true != VOID
    for t, (i, p), (j, g) in itertools.product(range(2), enumerate(segments), enumerate(objects)):
        if j == 0:
            of_segment = contour((pred[t] == p) & valid[t])
        expected = f_measure(of_segment, contour(true[t] == g), tolerance_in_pixels((height, width)))
        assert scores[t, i, j] == close(expected)


@pytest.mark.parametrize("radius", [1, 2, 3, 5, 8])
def test_contours_are_widened_by_a_euclidean_disk(radius, monkeypatch):
    monkeypatch.setattr("interpreter.metrics.boundary.tolerance_in_pixels", lambda size: radius)
    pred = np.zeros((19 * 19, 40, 60), np.uint8)
    pred[:, 20, 20] = 1
    offsets = np.array(list(itertools.product(range(-9, 10), repeat=2)))
    true = np.zeros_like(pred)
    true[np.arange(len(true)), 20 + offsets[:, 0], 20 + offsets[:, 1]] = 1  # its contour moves by one pixel
    corner = np.array(list(itertools.product(range(2), repeat=2)))
    distance = np.sqrt(((corner[:, None] - corner + offsets[:, None, None]) ** 2).sum(axis=-1))
    expected = (distance.min(axis=1) <= radius).mean(axis=1)  # precision equals recall here
    assert np.allclose(boundary_f(pred, true, np.array([1]), np.array([1]))[:, 0, 0], expected, rtol=0, atol=EXACT)


def test_the_tolerance_is_the_official_one():
    assert [tolerance_in_pixels(size) for size in ((480, 854), (336, 504), (3, 4), (600, 800), (601, 800))] == [
        8,
        5,
        1,
        8,
        9,
    ]


@cases
def test_j_and_f_of_davis_are_those_of_scipy_on_mean_scores(seed):
    pred, true = annotated(*random_video(seed))
    if not len(true):
        return
    a, b, _, _ = masks(pred, true)
    a += [np.zeros_like(true, bool)] * (len(b) - len(a))
    radius = tolerance_in_pixels(true.shape[1:])
    j = [[mean(iou(p, g, 1.0) for p, g in zip(x, y, strict=True)) for y in b] for x in a]
    lines_a, lines_b = ([[contour(frame) for frame in mask] for mask in side] for side in (a, b))
    f = [[mean(f_measure(p, g, radius) for p, g in zip(x, y, strict=True)) for y in lines_b] for x in lines_a]
    j, f = (np.reshape(values, (len(a), len(b))) for values in (j, f))
    rows, columns = linear_sum_assignment(-(j + f) / 2)
    scores = metrics.score_video(metrics.PROTOCOLS["davis-2017-unsupervised-annotated"], pred, true)
    assert sum(scores["jf"]) == close(((j + f) / 2)[rows, columns].sum())
    pairs = [(r, c) for r, c in itertools.product(range(len(a)), range(len(b)))]
    for c, (one, two, both) in enumerate(zip(scores["j"], scores["f"], scores["jf"], strict=True)):
        assert both == close((one + two) / 2)
        assert any((j[r, k], f[r, k]) == close((one, two)) for r, k in pairs if k == c)

    merged = np.where(np.isin(true, objects_of(true)), 1, true)
    single = metrics.score_video(metrics.PROTOCOLS["smtc"], pred, true)["j"]
    candidates = [mean(iou(p, g, 1.0) for p, g in zip(x, merged == 1, strict=True)) for x in masks(pred, true)[0]]
    assert single == close([max(candidates)] if b else [])
