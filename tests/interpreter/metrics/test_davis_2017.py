"""DAVIS-2017 and SMTC's variant: the rules of the official code, mask by mask, and its special cases by hand."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from interpreter.metrics import PROTOCOLS, UnknownIdError, score_video
from interpreter.metrics.boundary import tolerance_in_pixels

from .oracles import VOID, close, contour, f_measure, iou

SEMI, UNSUPERVISED, ANNOTATED = "davis-2017", "davis-2017-unsupervised", "davis-2017-unsupervised-annotated"
SMTC = "smtc-multi-object"
STATISTICS = ("j", "j_recall", "j_decay", "f", "f_recall", "f_decay")


def score(name, pred, true, background=0):
    return score_video(PROTOCOLS[name], pred, true, background=background)


def line(*labels, frames=1):
    """A video of one row of pixels, the same in every frame."""
    return np.tile(np.array(labels, np.uint8), (frames, 1, 1))


def random_video(seed):
    """Blocks of 2 pixels that mostly do not move; ids with gaps, void pixels and frames, objects that enter later."""
    rng = np.random.default_rng(seed)
    frames, height, width = rng.integers((1, 1, 1), (12, 6, 6))
    true = rng.choice([0, 1, 2, 4, 6, VOID], (frames, height, width), p=[0.3, 0.2, 0.2, 0.15, 0.1, 0.05])
    for t in range(1, frames):
        stay = rng.random((height, width)) < 0.7
        true[t][stay] = true[t - 1][stay]
    if seed % 2:
        true[0][true[0] == 6] = 0
    true[rng.random(frames) < 0.2] = VOID
    pred = np.where(rng.random(true.shape) < 0.6, np.minimum(true, 6), rng.integers(0, rng.integers(1, 7), true.shape))
    return pred.repeat(2, 1).repeat(2, 2), true.repeat(2, 1).repeat(2, 2)


def values(masks, objects, known):
    """J and F of every pair of masks in every frame: two arrays [T, P, G]."""
    radius = tolerance_in_pixels(known.shape[1:])
    j, f = (np.zeros((len(known), len(masks), len(objects))) for _ in range(2))
    for t, here in enumerate(known):
        lines = [[contour(mask[t] & here) for mask in side] for side in (masks, objects)]
        for p, mask in enumerate(masks):
            for g, thing in enumerate(objects):
                j[t, p, g] = iou(mask[t] & here, thing[t] & here, 1.0)
                f[t, p, g] = f_measure(lines[0][p], lines[1][g], radius)
    return j, f


def read(pred, true, *, void_is_background=False):
    """Masks by id as the official code reads them: objects up to the highest id of the first frame, all ids of pred."""
    count = max([int(g) for g in true[0].ravel() if g != VOID], default=0)
    objects = [true == g for g in range(1, count + 1)]
    segments = [pred == p for p in range(1, max(int(pred.max()), count) + 1)]
    return segments, objects, np.ones(true.shape, bool) if void_is_background else true != VOID


def statistics(per_frame):
    """Mean, recall and decay of a list of values of J or F."""
    n, bounds = len(per_frame), []
    for quarter in range(5):
        place = 1 + (n - 1) * quarter / 4
        bounds.append(int(np.floor(place + 0.5)) - 1)  # to the nearest frame, a half upwards
    first, last = per_frame[: bounds[1] + 1], per_frame[bounds[3] :]
    return np.mean(per_frame), np.mean([value > 0.5 for value in per_frame]), np.mean(first) - np.mean(last)


def test_semi_supervised_track_equals_masks_by_id():
    scored = refused = 0
    for seed in range(200):
        pred, true = random_video(seed)
        segments, objects, known = read(pred, true, void_is_background=True)
        if not len(true[1:-1]) or not objects:
            continue
        if pred[1:-1].max() > len(objects):
            with pytest.raises(UnknownIdError):
                score(SEMI, pred, true)
            refused += 1
            continue
        j, f = values([s[1:-1] for s in segments[: len(objects)]], [g[1:-1] for g in objects], known[1:-1])
        scores = score(SEMI, pred, true)
        expected = [(*statistics(j[:, g, g]), *statistics(f[:, g, g])) for g in range(len(objects))]
        for name, column in zip(STATISTICS, zip(*expected, strict=True), strict=True):
            assert scores[name] == close(column)
        assert scores["jf"] == close([(row[0] + row[3]) / 2 for row in expected])
        scored += 1
    assert min(scored, refused) > 20


@pytest.mark.parametrize("name", [UNSUPERVISED, SMTC])
def test_proposals_are_matched_by_the_official_rules(name):
    for seed in range(200):
        pred, true = random_video(seed)
        segments, objects, known = read(pred, true)
        scores = score(name, pred, true)
        assert (scores["objects"], scores["frames"]) == (len(objects), len(true))
        if not objects:
            continue
        j, f = values(segments, objects, known)
        quality = (j + f) / 2
        if name == UNSUPERVISED:
            rows, columns = linear_sum_assignment(-quality.mean(axis=0))
            total = quality.mean(axis=0)[rows, columns].sum()
        else:
            matches = [linear_sum_assignment(-frame) for frame in quality]
            total = np.mean([frame[match].sum() for frame, match in zip(quality, matches, strict=True)])
        assert sum(scores["jf"]) == close(total)


@pytest.mark.parametrize("name", [UNSUPERVISED, SMTC])
def test_an_object_above_the_ids_of_the_first_frame_is_ignored(name):
    true = np.concatenate([line(1, 1, 0, 0, frames=2), line(1, 1, 0, 3, frames=2)])
    pred = line(1, 1, 0, 0, frames=4)
    assert score(name, pred, true)["j"] == [1]
    assert score(ANNOTATED, pred, true)["j"] == [1, 0.5]  # absent from two frames of four, missed in the others


@pytest.mark.parametrize("name", [UNSUPERVISED, SMTC])
def test_late_object_counts_if_its_id_is_below_the_highest(name):
    true = np.concatenate([line(2, 2, 0, 0, frames=2), line(2, 2, 0, 1, frames=2)])
    assert score(name, line(2, 2, 0, 0, frames=4), true)["j"] == [0.5, 1]


@pytest.mark.parametrize("name", [UNSUPERVISED, SMTC])
def test_a_gap_in_the_ids_of_the_truth_is_an_empty_object(name):
    true, pred = line(1, 1, 0, 3), line(1, 1, 0, 2)
    scores = score(name, pred, true)
    assert (scores["j"], scores["f"], scores["objects"]) == ([1, 1, 1], [1, 1, 1], 3)
    pred[0, 0, 2] = 3  # a third segment has to be matched with the empty object
    assert score(name, pred, true)["j"] == [1, 0, 1]
    assert score(ANNOTATED, pred, true)["j"] == [1, 1]


def test_an_empty_object_has_no_track():
    scores = score(UNSUPERVISED, line(1, 1, 0, 3, frames=3), line(1, 1, 0, 3, frames=3))
    for name in ("identity_switches", "identity_switches_per_100", "fragmentations", "fragmentations_per_100"):
        assert scores[name] == close([0, np.nan, 0])


def test_a_gap_in_the_ids_of_the_prediction_is_an_empty_proposal():
    true = np.concatenate([line(1, 2, 0, 0), line(1, 0, 0, 0, frames=3)])
    pred = line(1, 0, 0, 3, frames=4)  # no segment for object 2, which three frames of four do not show
    assert score(UNSUPERVISED, pred, true)["j"] == [1, 0.75]  # the empty id 2
    assert score(UNSUPERVISED, np.minimum(pred, 2), true)["j"] == [1, 0]  # no gap: segment 2, which is wrong


@pytest.mark.parametrize("name", [UNSUPERVISED, SMTC])
def test_a_frame_that_is_void_everywhere_scores_one(name):
    true, pred = line(1, 1, 1, 0, frames=4), line(1, 0, 0, 0, frames=4)
    true[2] = VOID
    pred[2] = [5, 4, 3, 2]
    scores = score(name, pred, true)
    assert scores["j"] == close([(3 * 1 / 3 + 1) / 4])
    assert scores["f"] == close([0.25])  # contours at pixels 2 and 0, farther apart than the tolerance of 1
    assert score(ANNOTATED, pred, true)["j"] == close([1 / 3])


def test_a_first_frame_that_is_void_everywhere_names_no_object():
    true = line(1, 1, 0, 0, frames=3)
    true[0] = VOID
    for name in (UNSUPERVISED, SMTC):
        assert score(name, true, true)["j"] == []
    assert score(ANNOTATED, true, true)["j"] == [1]


def test_void_is_background_in_the_semi_supervised_track():
    true, pred = line(1, 1, 0, 0, frames=4), line(1, 1, 0, 0, frames=4)
    true[1, 0, 3], pred[1, 0, 3] = VOID, 1  # a third pixel, which counts as wrong: 2 / 3
    true[2] = VOID  # nothing is there, but the prediction says so: 0
    assert score(SEMI, pred, true)["j"] == close([(2 / 3 + 0) / 2])


def test_recall_and_decay_by_hand():
    # Eight frames between the ends: J = 1 in five, 1/2 in one (not above 0.5), 0 in two. Quarters of eight frames begin
    # at 1, 2.75, 4.5 and 6.25: frames 1 to 3 against 6 to 8.
    true = line(1, 1, 0, 0, frames=10)
    pred = true.copy()
    pred[[0, 9]] = 0  # the ends do not count
    pred[3, 0, 1] = 0
    pred[[7, 8]] = 0
    scores = score(SEMI, pred, true)
    assert scores["j"] == close([5.5 / 8])
    assert scores["j_recall"] == close([5 / 8])
    assert scores["j_decay"] == close([(1 + 1 + 0.5) / 3 - (1 + 0 + 0) / 3])
    assert (scores["objects"], scores["frames"]) == (1, 8)


@pytest.mark.parametrize("background", [0, None])
def test_ids_of_the_first_frame_decide_not_the_best_fit(background):
    true = line(1, 1, 2, 2, frames=3)
    assert score(SEMI, true, true, background)["j"] == [1, 1]
    assert score(SEMI, np.array([0, 2, 1])[true], true, background)["j"] == [0, 0]
    assert score(SEMI, np.minimum(true, 1), true, background)["j"] == [0.5, 0]  # object 2 has no segment


def test_ids_that_the_first_frame_does_not_name_are_refused():
    true = line(1, 1, 0, 0, frames=3)
    pred = line(1, 1, 0, 7, frames=3)
    with pytest.raises(UnknownIdError, match="has id 7, but the first annotated frame names the objects 1 to 1"):
        score(SEMI, pred, true)
    pred[1] = [1, 1, 0, 0]
    assert score(SEMI, pred, true)["j"] == [1]  # the first and last frame are not scored
    with pytest.raises(UnknownIdError, match="names no object"):
        score(SEMI, pred, np.zeros_like(true))


@pytest.mark.parametrize("frames", [1, 2])
def test_nothing_is_left_between_the_ends_of_one_or_two_frames(frames):
    true = line(1, 1, 0, 0, frames=frames)
    assert score(SEMI, true, true) == {name: [] for name in PROTOCOLS[SEMI].metrics} | {"objects": 0, "frames": 0}


def test_match_in_every_frame_ignores_identities():
    true = line(1, 1, 2, 2, frames=4)
    pred = true.copy()
    pred[2:] = np.array([0, 2, 1])[true[2:]]
    assert score(SMTC, pred, true)["jf"] == [1, 1]
    assert score(UNSUPERVISED, pred, true)["j"] == [0.5, 0.5]
    wide = np.arange(1, 51).reshape(1, 1, 50)  # 50 segments of one pixel, in two frames
    wide = np.concatenate([wide, wide])
    only = (wide == 45).astype(np.uint8)
    assert score(SMTC, wide, only)["j"] == [1]
    assert score(UNSUPERVISED, wide, only)["j"] == [0]  # the 20 largest, of equal ones those with the smaller ids
    many = np.arange(1, 321).reshape(1, 1, 320)
    assert score(SMTC, many, (many == 300).astype(np.uint8))["j"] == [1]
    assert score(SMTC, many, (many == 301).astype(np.uint8))["j"] == [0]
