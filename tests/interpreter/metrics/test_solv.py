"""SOLV's evaluation as described in the paper, and with the mistakes of its published code."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from interpreter.metrics import PROTOCOLS, score_video

from .oracles import VOID, annotated, ari, close, iou, mean, mean_iou, objects_of

MATCHED_ON_FRAMES = ("interpreter", "solv", "solv-published")


def small_then_large():
    """Four frames of 8x8: the object is one pixel in three of them and the left half in the last.

    Segment 0 is that pixel in the first three frames, segment 2 the left half in the last, segment 1 all else.
    """
    true = np.zeros((4, 8, 8), np.uint8)
    true[:3, 0, 0], true[3, :, :4] = 1, 1
    pred = np.ones_like(true)
    pred[:3, 0, 0], pred[3, :, :4] = 0, 2
    return pred, true


@pytest.mark.parametrize("name", MATCHED_ON_FRAMES)
def test_a_video_is_matched_on_the_mean_over_frames_of_the_iou(name):
    # Segment 0: (1 + 1 + 1 + 0) / 4. Segment 2: (0 + 0 + 0 + 1) / 4, although it has 32 of the object's 35 pixels.
    assert score_video(PROTOCOLS[name], *small_then_large())["miou_video"] == [0.75]


def test_spatio_temporal_match_is_a_protocol_of_its_own():
    pred, true = small_then_large()
    assert score_video(PROTOCOLS["interpreter-spatio-temporal"], pred, true)["miou_video"] == [0.25]
    assert score_video(PROTOCOLS["interpreter"], pred, true)["miou_video"] == [0.75]


@pytest.mark.parametrize("name", MATCHED_ON_FRAMES)
def test_frames_without_segment_and_object_are_in_no_mean(name):
    # The object is in frames 0 and 1 of ten. Segment 1 has 3 of its 8 pixels there and is nowhere else; segment 2 has
    # the other 5, and a pixel of every later frame: 3/8 against 2 * 5/8 / 10.
    true = np.zeros((10, 2, 8), np.uint8)
    true[:2, 0] = 1
    pred = np.zeros_like(true)
    pred[:2, 0], pred[2:, 1, 0] = [1, 1, 1, 2, 2, 2, 2, 2], 2
    assert score_video(PROTOCOLS[name], pred, true)["miou_video"] == [3 / 8]


def test_a_row_of_zeros_relabels_the_segment_that_has_its_number():
    # Segments 0 and 2, three objects: rows 0 and 1 are the segments, row 2 is zeros. Read as ids: row 0 is right, there
    # is no segment 1, and segment 2, which is object 2, becomes the object that was left for the row of zeros.
    true = np.array([[[1, 1, 1, 1, 2, 2, 3, 0]]], np.uint8)
    pred = np.array([[[0, 0, 0, 0, 2, 2, 2, 2]]], np.uint8)
    assert score_video(PROTOCOLS["solv-published"], pred, true)["miou_video"] == [1, 0, 0.25]
    assert score_video(PROTOCOLS["solv"], pred, true)["miou_video"] == [1, 0.5, 0]


def test_published_solv_takes_background_for_a_segment():
    true = np.array([[[0, 0, 1, 1, 2, 2]]], np.uint8)
    assert score_video(PROTOCOLS["solv-published"], true, true, background=0)["miou_video"] == [1, 1]


def random_video(seed):
    """Objects that come and go, void pixels, and segments with gaps in their ids, often fewer than the objects."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers((1, 3, 3), (7, 7, 8)))
    true = rng.choice([0, 1, 2, 3, 4, 5, VOID], shape, p=[0.25, *[0.14] * 5, 0.05])
    true[rng.random(shape[0]) < 0.1] = VOID
    ids = rng.permutation(6)[: rng.integers(1, 5)]
    follows = rng.choice(ids, 6)[np.minimum(true, 5)]
    return np.where(rng.random(shape) < 0.6, follows, rng.choice(ids, shape)), true


def evaluated(pred, true, *, published, rows_of_zeros=True):
    """mIoU of each object of the first frame, and mean FG-ARI, from maps that are relabelled by the match."""
    pred, true = annotated(pred, true)
    objects = objects_of(true[:1])
    true = np.where(np.isin(true, [*objects, VOID]), true, 0)
    known = true != VOID
    ids = [int(p) for p in np.unique(pred)]
    matrix = [[mean_iou((pred == p) & known, true == g) for g in objects] for p in ids]
    while published and rows_of_zeros and len(matrix) < len(objects):
        matrix.append([0.0] * len(objects))
    painted = np.zeros_like(true)
    for row, column in zip(*linear_sum_assignment(-np.reshape(matrix, (-1, len(objects)))), strict=True):
        painted[pred == (row if published else ids[row])] = objects[column]
    scores = [mean(iou(p, g) for p, g in zip((painted == k) & known, true == k, strict=True)) for k in objects]
    return scores, mean(ari(t, p) for p, t in zip(painted, true, strict=True))


def test_both_solv_protocols_equal_painted_maps():
    from_ids = from_rows_of_zeros = 0
    for seed in range(300):
        pred, true = random_video(seed)
        if not annotated(pred, true)[1].size:
            continue
        for name, published in (("solv", False), ("solv-published", True)):
            miou, fg_ari = evaluated(pred, true, published=published)
            result = score_video(PROTOCOLS[name], pred, true)
            assert result["miou_video"] == close(miou)
            assert result["fg_ari_frame"] == close(fg_ari)
        from_ids += miou != evaluated(pred, true, published=False)[0]
        from_rows_of_zeros += miou != evaluated(pred, true, published=True, rows_of_zeros=False)[0]
    assert min(from_ids, from_rows_of_zeros) > 100  # videos in which each mistake changes mIoU, so the test covers both
