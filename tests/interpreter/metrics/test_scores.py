"""FG-ARI, mIoU and J against scikit-learn, brute force and values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from interpreter import metrics

VOID = 255


@st.composite
def videos(draw):
    """A tiny random video: predictions with gaps between ids, truth with background, void and absent objects."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    pred = rng.choice([0, 3, 7, 255, 1000][: draw(st.integers(1, 5))], shape)
    true = rng.choice([0, 1, 2, 4, VOID][: draw(st.integers(1, 5))], shape)
    true[rng.random(shape[0]) < 0.2] = 0
    return pred, true


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def objects_of(true):
    return [g for g in np.unique(true) if g not in (0, VOID)]


def iou(a, b, empty):
    union = np.sum(a | b)
    return np.sum(a & b) / union if union else empty


@settings(max_examples=150, deadline=None)
@given(videos())
def test_fg_ari_is_that_of_scikit_learn(video):
    pred, true = video
    keep = (true != 0) & (true != VOID)
    frames = [adjusted_rand_score(t[m], p[m]) for p, t, m in zip(pred, true, keep, strict=True) if m.any()]
    assert metrics.fg_ari_frame(pred, true) == pytest.approx(mean(frames), nan_ok=True, abs=1e-12)
    whole = adjusted_rand_score(true[keep], pred[keep]) if keep.any() else math.nan
    assert metrics.fg_ari_video(pred, true) == pytest.approx(whole, nan_ok=True, abs=1e-12)


def best_assignment(score):
    """The best sum of one-to-one pairs by trying them all, and the pairs, for a matrix [P][G]."""
    rows, columns = range(len(score)), range(len(score[0]) if score else 0)
    if len(rows) >= len(columns):
        options = [list(zip(p, columns, strict=True)) for p in itertools.permutations(rows, len(columns))]
    else:
        options = [list(zip(rows, p, strict=True)) for p in itertools.permutations(columns, len(rows))]
    return max(options, key=lambda pairs: sum(score[r][c] for r, c in pairs))


@settings(max_examples=100, deadline=None)
@given(videos())
def test_video_miou_is_that_of_brute_force(video):
    pred, true = video
    valid = true != VOID
    segments, objects = list(np.unique(pred)), objects_of(true)
    volume = [[iou((pred == p) & valid, true == g, 0) for g in objects] for p in segments]
    expected = [0.0] * len(objects)
    rows, columns = linear_sum_assignment(np.reshape(volume, (len(segments), len(objects))), maximize=True)
    for row, column in zip(rows, columns, strict=True):
        a, b = (pred == segments[row]) & valid, true == objects[column]
        scores = [iou(x, y, None) for x, y in zip(a, b, strict=True)]
        expected[column] = mean(s for s in scores if s is not None)
    assert metrics.video_miou(pred, true) == pytest.approx(expected)
    by_trial = best_assignment(volume)
    assert sum(volume[r][c] for r, c in zip(rows, columns, strict=True)) == pytest.approx(
        sum(volume[r][c] for r, c in by_trial)
    )


@settings(max_examples=100, deadline=None)
@given(videos())
def test_frame_miou_is_that_of_brute_force(video):
    pred, true = video
    frames = []
    for p, t in zip(pred, true, strict=True):
        objects = objects_of(t)
        score = [[iou((p == s) & (t != VOID), t == g, 0) for g in objects] for s in np.unique(p)]
        if objects:
            frames.append(sum(score[r][c] for r, c in best_assignment(score)) / len(objects))
    assert metrics.frame_miou(pred, true) == pytest.approx(mean(frames), nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(videos())
def test_region_similarity_is_that_of_brute_force(video):
    pred, true = video
    inner_pred, inner_true = pred[1:-1], true[1:-1]
    valid, foreground = inner_true != VOID, (inner_true != 0) & (inner_true != VOID)
    scores = [
        mean(iou(a & v, f, 1.0) for a, v, f in zip(inner_pred == s, valid, foreground, strict=True))
        for s in np.unique(pred)
    ]
    expected = max(scores) if foreground.any() else math.nan
    assert metrics.region_similarity(pred, true) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=100, deadline=None)
@given(videos())
def test_region_similarity_multi_is_that_of_brute_force(video):
    pred, true = video
    valid, objects = true != VOID, objects_of(true)
    masks = [(pred == s) & valid for s in np.unique(pred)]
    masks += [np.zeros_like(valid)] * (len(objects) - len(masks))
    score = [[mean(iou(a, b, 1.0) for a, b in zip(m, true == g, strict=True)) for g in objects] for m in masks]
    best = sum(score[r][c] for r, c in best_assignment(score))
    found = metrics.region_similarity_multi(pred, true)
    assert len(found) == len(objects)
    assert sum(found) == pytest.approx(best)


def two_squares(frames=4):
    """Object 1 on the left, object 2 on the right, background below."""
    true = np.zeros((frames, 6, 8), np.uint8)
    true[:, :4, :3], true[:, :4, 5:] = 1, 2
    return true


def test_perfect_prediction_scores_one_whatever_its_ids():
    true = two_squares()
    pred = np.array([900, 3, 41])[true]
    scores = metrics.evaluate_video(pred, true)
    assert scores["fg_ari_frame"] == scores["fg_ari_video"] == scores["miou_frame"] == 1
    assert scores["miou_video"] == scores["j_mean_multi"] == [1, 1]
    assert scores["j_mean"] == 0.5  # one segment covers one of two equal objects, which are one foreground here


def test_permuted_ids_change_nothing():
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, 6, (4, 9, 7)), rng.integers(0, 4, (4, 9, 7))
    renamed = rng.permutation(50)[pred]
    expected = metrics.evaluate_video(pred, true)
    for name, score in metrics.evaluate_video(renamed, true).items():
        assert score == pytest.approx(expected[name]), name


def test_scores_keep_the_order_of_object_ids():
    true = two_squares()
    pred = np.array([0, 9, 4])[true]  # the segment of object 2 has the smaller id
    pred[:, 0, 5:] = 7  # and loses a quarter of it
    assert metrics.video_miou(pred, true) == pytest.approx([1, 0.75])
    assert metrics.region_similarity_multi(pred, true) == pytest.approx([1, 0.75])


def test_identities_swapped_halfway_cost_per_video_but_not_per_frame():
    true = two_squares()
    pred = true.copy()
    pred[2:] = np.array([0, 2, 1])[true[2:]]
    scores = metrics.evaluate_video(pred, true)
    assert scores["fg_ari_frame"] == scores["miou_frame"] == 1
    assert scores["fg_ari_video"] < 0.1
    assert scores["miou_video"] == pytest.approx([0.5, 0.5])


def test_over_segmentation_is_scored_by_hand():
    true = two_squares(1)
    pred = true.copy()
    pred[:, :2, :3] = 3  # object 1 in two equal halves
    assert metrics.video_miou(pred, true) == pytest.approx([0.5, 1])
    # Pairs among 24 foreground pixels: 276 in all; together in truth 132, in prediction 66 + 15 + 15 = 96, in both 96.
    expected = 96 * 132 / 276
    assert metrics.fg_ari_frame(pred, true) == pytest.approx((96 - expected) / ((96 + 132) / 2 - expected))


def test_single_object_is_one_if_whole_and_zero_if_split():
    true = np.ones((1, 2, 2), int)
    assert metrics.fg_ari_frame(np.zeros((1, 2, 2), int), true) == 1
    assert metrics.fg_ari_frame(np.array([[[0, 0], [0, 1]]]), true) == 0


def test_one_segment_for_everything_matches_one_object():
    true = two_squares()
    pred = metrics.one_segment(*true.shape)
    assert sorted(metrics.video_miou(pred, true)) == pytest.approx([0, 12 / 48])
    assert metrics.fg_ari_frame(pred, true) == 0


def test_segment_seen_while_its_object_is_absent_costs_a_zero():
    true = two_squares()
    true[2:][true[2:] == 2] = 0
    pred = two_squares()
    assert metrics.video_miou(pred, true) == pytest.approx([1, 0.5])  # frames 2 and 3: union, no intersection
    pred[2:][pred[2:] == 2] = 0
    assert metrics.video_miou(pred, true) == pytest.approx([1, 1])  # both empty: the frames do not count
    assert metrics.region_similarity_multi(pred, true) == pytest.approx([1, 1])


def test_object_without_a_segment_scores_zero_but_j_one_where_absent():
    true = two_squares()
    true[1:][true[1:] == 2] = 0  # object 2 is in one frame of four
    pred = metrics.one_segment(*true.shape)
    assert metrics.video_miou(pred, true) == pytest.approx([12 / 48, 0])
    assert metrics.region_similarity_multi(pred, true) == pytest.approx([12 / 48, 3 / 4])


def test_frames_without_foreground_are_skipped():
    true = two_squares()
    true[1] = 0
    pred = two_squares()
    assert metrics.fg_ari_frame(pred, true) == metrics.frame_miou(pred, true) == 1


def test_void_pixels_change_nothing():
    true, rng = two_squares(), np.random.default_rng(1)
    pred = true.copy()
    true[:, 3:5], pred[:, 3:5] = VOID, rng.integers(0, 9, (4, 2, 8))
    scores = metrics.evaluate_video(pred, true)
    assert scores["fg_ari_video"] == scores["miou_frame"] == 1
    assert scores["miou_video"] == scores["j_mean_multi"] == [1, 1]


def test_j_leaves_out_the_first_and_last_frame():
    true = two_squares() > 0
    pred = true.copy()
    pred[0], pred[-1] = ~true[0], False
    assert metrics.region_similarity(pred, true) == 1
    assert math.isnan(metrics.region_similarity(pred[:2], true[:2]))


def test_j_is_one_where_segment_and_object_are_both_absent():
    true = np.zeros((5, 4, 4), int)
    true[2, :2] = 1
    pred = np.full_like(true, 5)
    pred[2, :2] = 6
    assert metrics.region_similarity(pred, true) == 1
    pred[1, 0] = 6  # an error in a frame that has no object
    assert metrics.region_similarity(pred, true) == pytest.approx(2 / 3)


def test_more_than_twenty_proposals_keep_the_largest():
    true = np.zeros((3, 10, 30), int)
    true[:, 0, 0] = 1
    pred = np.broadcast_to(np.arange(30) + 1, true.shape).copy()
    pred[:, 0, 0] = 99  # perfect, but the smallest of 31 segments
    assert metrics.video_miou(pred, true) == [1]
    assert metrics.region_similarity_multi(pred, true) == [0]


def test_large_videos_are_exact():
    true = np.repeat(np.arange(4, dtype=np.uint8), 36 * 336 * 126).reshape(36, 336, 504)
    pred = true % 3
    counts = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]) * 36 * 336 * 126
    pairs = [int(n) * (int(n) - 1) // 2 for n in counts.sum(axis=1)]
    assert sum(pairs) ** 2 > 2**63  # would overflow if it were not for Python integers
    assert metrics.fg_ari_video(pred, true) == 1


def test_summary_weighs_objects_or_videos_as_the_protocol_says():
    one, two = two_squares()[:, :, :4], two_squares()
    perfect = metrics.evaluate_video(one, one)
    poor = metrics.evaluate_video(metrics.one_segment(*two.shape), two)
    nothing = metrics.evaluate_video(one, np.zeros_like(one))
    summary = metrics.summarise([perfect, poor, nothing])
    assert (summary["videos"], summary["objects"]) == (3, 3)
    assert summary["miou_video"] == pytest.approx((1 + 0.25 + 0) / 3)  # objects
    assert summary["fg_ari_frame"] == pytest.approx((1 + 0) / 2)  # videos with foreground
    assert summary["videos_fg_ari_frame"] == 2
    assert set(metrics.PROTOCOLS) <= set(summary)


def test_summary_of_nothing_is_nan():
    summary = metrics.summarise([])
    assert summary["videos"] == summary["objects"] == 0
    assert all(math.isnan(summary[name]) for name in metrics.PROTOCOLS)


def test_annotated_frames_pick_their_predictions():
    true = two_squares(6)
    pred = true.copy()
    pred[[1, 2, 4]] = 0
    scores = metrics.evaluate_video(pred, true[[0, 3, 5]], frames=[0, 3, 5])
    assert scores["miou_video"] == [1, 1]
    with pytest.raises(ValueError, match="frames"):
        metrics.evaluate_video(pred, true[[0]], frames=[6])


@pytest.mark.parametrize(
    ("pred", "true"),
    [
        (np.zeros((2, 4, 4), int), np.zeros((2, 8, 8), int)),
        (np.zeros((4, 4), int), np.zeros((4, 4), int)),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4), int)),
        (np.zeros((0, 4, 4), int), np.zeros((0, 4, 4), int)),
        (np.full((2, 4, 4), -1), np.zeros((2, 4, 4), int)),
        (np.full((2, 4, 4), 65536), np.zeros((2, 4, 4), int)),
    ],
    ids=["size", "rank", "float", "empty", "negative", "too large"],
)
def test_bad_input_is_refused(pred, true):
    with pytest.raises(ValueError, match="pred"):
        metrics.evaluate_video(pred, true)
