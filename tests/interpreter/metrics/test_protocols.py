"""Each named protocol on constructed videos, against numbers worked out by hand, and the mean of a data set."""

import math

import numpy as np
import pytest

from interpreter.metrics import METRICS, PROTOCOLS, resize_labels, score_video, scoring_size, summarise

VOID = 255
ONE_OBJECT = ("davis-2016", "smtc")  # all objects of the truth are one there
UNNAMED = tuple(name for name in PROTOCOLS if PROTOCOLS[name].match != "same-id")  # segments may have any id
SEVERAL = tuple(name for name in UNNAMED if name not in ONE_OBJECT)
HIGHER = {name for name, meaning in METRICS.items() if "lower is better" not in meaning}


def two_squares(frames=12):
    """6x8 pixels: object 1 (4x3) top left, object 2 (4x3) top right, 24 of background below and between."""
    true = np.zeros((frames, 6, 8), np.uint8)
    true[:, :4, :3], true[:, :4, 5:] = 1, 2
    return true


def score(name, pred, true, **options):
    return score_video(PROTOCOLS[name], pred, true, **options)


def means(name, pred, true, **options):
    """Every number of a video, averaged over objects or clips as for a data set of one video."""
    summary = summarise(PROTOCOLS[name], [score(name, pred, true, **options)])
    return {metric: summary[metric] for metric in PROTOCOLS[name].metrics}


def perfect(name):
    """Numbers of a prediction that is right in every frame."""
    return {metric: 1.0 if metric in HIGHER else 0.0 for metric in PROTOCOLS[name].metrics}


def check(scores, expected):
    for metric, value in expected.items():
        assert scores[metric] == pytest.approx(value, abs=1e-12, nan_ok=True), metric


@pytest.mark.parametrize("name", PROTOCOLS)
def test_perfect_prediction_scores_one_under_every_protocol(name):
    true = two_squares()
    pred = true > 0 if name in ONE_OBJECT else true
    assert means(name, pred, true) == perfect(name)


@pytest.mark.parametrize("name", UNNAMED)
def test_gaps_between_ids_matter_to_solv_published_alone(name):
    true = two_squares()
    pred = np.array([0, 3, 3 if name in ONE_OBJECT else 5])[true]
    expected = {"miou_video": 0.0, "fg_ari_frame": 0.0} if name == "solv-published" else perfect(name)
    assert means(name, pred, true) == expected


def test_solv_published_takes_rows_for_ids():
    true = two_squares()
    pred = np.array([0, 2, 3])[true]  # rows 1 and 2 of the match are read as ids: segment 1 does not exist, 2 does
    scores = score("solv-published", pred, true)
    assert scores["miou_video"] == [0, 0]  # segment 2 covers object 1 and is taken for object 2
    assert scores["fg_ari_frame"] == 1  # as a partition it is still right: {object 1}, {everything else}
    assert score("solv", pred, true)["miou_video"] == [1, 1]


def with_twins(expected):
    """Add the numbers of protocols that differ from another one only in cases that the test does not contain."""
    twins = {"interpreter": "interpreter-spatio-temporal", "solv": "solv-published"}
    twins |= {"davis-2017-unsupervised": "davis-2017-unsupervised-annotated"}
    return {twin: expected[name] for name, twin in twins.items() if name in expected} | expected


OVER = {
    # Object 1 in two halves of 6 pixels. IoU of a half 1/2. Pairs of the 24 foreground pixels: 276; together in truth
    # 132, in prediction and in both 66 + 15 + 15 = 96: ARI = (96 - e) / (114 - e), e = 96 * 132 / 276.
    "interpreter": {
        "miou_video": 0.75,
        "mbo_video": 0.75,
        "mbo_frame": 0.75,
        "miou_frame": 0.75,
        "fg_ari_frame": 0.736,
    },
    # After relabelling the second half is background: clusters of 12, 6 and 6 pixels all the same.
    "solv": {"miou_video": 0.75, "fg_ari_frame": 0.736},
    "videosaur": {"fg_ari_frame": 0.736, "mbo_video": 0.75, "mbo_frame": 0.75},
    "slot-contrast": {"fg_ari_frame": 0.736, "mbo_video": 0.75, "mbo_frame": 0.75, "identity_switches": 0},
    "davis-2017-unsupervised": {"j": 0.75, "fragmentations": 0},
    "smtc-multi-object": {"j": 0.75},
    "davis-2016": {"j": 0.5},  # the best segment: object 2, 12 of 24 pixels
    "smtc": {"j": 0.5},
}


@pytest.mark.parametrize("name", UNNAMED)
def test_over_segmentation_by_hand(name):
    true = two_squares()
    pred = true.copy()
    pred[:, :2, :3] = 3
    expected_pairs = 96 * 132 / 276
    ari = (96 - expected_pairs) / (114 - expected_pairs)
    assert ari == pytest.approx(0.736, abs=5e-4)
    expected = {metric: ari if metric == "fg_ari_frame" else value for metric, value in with_twins(OVER)[name].items()}
    check(means(name, pred, true), expected)


def test_relabelling_puts_unmatched_segments_together():
    true = np.zeros((1, 1, 9), np.uint8)
    true[..., :8] = 1
    pred = np.array([[[0, 0, 0, 0, 1, 1, 2, 2, 3]]])
    # Clusters of 4, 2, 2: with one true object ARI is 0 if split. mIoU: segment 0 with 4 of 8 pixels.
    check(means("solv", pred, true), {"miou_video": 0.5, "fg_ari_frame": 0})
    true[..., 4:8] = 2
    # Object 2 is split in two equal segments, 1 is matched, 2 becomes background: clusters 4, 2, 2 on {4, 4}.
    # Together: in prediction and both 6 + 1 + 1 = 8, in truth 12, of 28 pairs.
    chance = 8 * 12 / 28
    check(means("solv", pred, true), {"miou_video": 0.75, "fg_ari_frame": (8 - chance) / (10 - chance)})
    pred[..., 8] = 2
    true[..., 1], pred[..., 1] = 1, 3  # two unmatched segments, 2 and 3, are one cluster after relabelling ...
    # ... of 1 + 2 pixels: predicted clusters 3, 2, 3; both: C(3,2) + C(2,2) + C(2,2) = 5; in prediction 3 + 1 + 3 = 7.
    chance = 7 * 12 / 28
    check(means("solv", pred, true), {"fg_ari_frame": (5 - chance) / (9.5 - chance)})
    # Not relabelled they are two: 3, 1, 2, 2 pixels: in prediction and both 3 + 0 + 1 + 1 = 5.
    chance = 5 * 12 / 28
    check(means("interpreter", pred, true), {"fg_ari_frame": (5 - chance) / (8.5 - chance)})


@pytest.mark.parametrize("name", UNNAMED)
def test_identities_swapped_between_the_clips(name):
    true = two_squares()
    pred = true.copy()
    pred[6:] = np.array([0, 2, 1])[true[6:]]
    # Whole video: 144 + 144 foreground pixels in four equal cells of 72.
    pairs, cells, sides = 288 * 287 / 2, 4 * 72 * 71 / 2, 2 * 144 * 143 / 2
    ari = (cells - sides**2 / pairs) / (sides - sides**2 / pairs)
    expected = {
        "interpreter": {
            **dict.fromkeys(("fg_ari_frame", "miou_frame", "mbo_frame", "identity_switches"), 1),
            "fg_ari_video": ari,
            "miou_video": 0.5,
            "mbo_video": 1 / 3,
            "identity_switches_per_100": 100 / 11,
        },
        "solv": {"fg_ari_frame": 1, "miou_video": 0.5},
        "videosaur": perfect("videosaur"),  # the swap falls between two clips of 6 frames
        "slot-contrast": {"fg_ari_video": ari, "mbo_video": 1 / 3, "fg_ari_frame": 1, "identity_switches": 1},
        "davis-2017-unsupervised": {"j": 0.5, "identity_switches": 1},
        "smtc-multi-object": {"j": 1, "f": 1},  # a match in every frame ignores identities
        "davis-2016": {"j": 0.5},
        "smtc": {"j": 0.5},
    }
    check(means(name, pred, true), with_twins(expected)[name])


@pytest.mark.parametrize("name", UNNAMED)
def test_an_object_that_is_absent_from_the_first_frame(name):
    true = two_squares()
    true[:6][true[:6] == 2] = 0
    pred = np.array([0, 1, 0])[true]  # object 2 is missed
    scores = score(name, pred, true)
    expected = {
        "interpreter": {"miou_video": [1, (0 * 6 + 6 / 3) / 12], "miou_frame": 5 / 6, "identity_switches": [0, 0]},
        "solv": {"miou_video": [1], "objects": 1},  # object 2 does not count
        # Clips: the first has object 1 alone, the second both; 12 of 36 pixels of segment 0 are object 2.
        "videosaur": {"mbo_video": [1, (1 + 1 / 3) / 2], "objects": 3},
        "slot-contrast": {"mbo_video": (1 + 72 / 432) / 2},
        "davis-2017-unsupervised": {"j": [1], "objects": 1},  # its id is above those of the first frame
        "smtc-multi-object": {"j": [1], "objects": 1},
        "davis-2017-unsupervised-annotated": {"j": [1, (0 * 6 + 6 / 3) / 12]},  # no segment for it but the background
        "davis-2016": {"j": [(5 * 1 + 5 / 2) / 10]},
        "smtc": {"j": [(6 * 1 + 6 / 2) / 12]},
    }
    check(scores, with_twins(expected)[name])
    if (
        name == "davis-2017-unsupervised-annotated"
    ):  # if 0 is declared background, the object is compared with an empty segment: J = F = 1 in
        scores = score(name, pred, true, background=0)  # the six frames without the object
        check(scores, {"j": [1, 0.5], "f": [1, 0.5], "jf": [1, 0.5]})


@pytest.mark.parametrize("name", UNNAMED)
def test_frames_without_foreground(name):
    true = two_squares()
    true[3] = 0
    pred = true > 0 if name in ONE_OBJECT else true
    assert means(name, pred, true) == perfect(name)
    pred = pred.copy()
    pred[3] = 1 if name in ONE_OBJECT else two_squares()[3]  # segments where there is nothing
    scores = means(name, pred, true)
    for metric in ("fg_ari_frame", "fg_ari_video", "miou_frame", "mbo_frame"):
        assert scores.get(metric, 1) == 1
    for metric, value in (("miou_video", 11 / 12), ("j", 9 / 10 if name == "davis-2016" else 11 / 12)):
        assert scores.get(metric, value) == pytest.approx(value)


@pytest.mark.parametrize("name", UNNAMED)
def test_a_video_without_foreground_defines_nothing(name):
    nothing, something = score(name, two_squares(), np.zeros_like(two_squares())), score(name, *[two_squares()] * 2)
    assert all(value == [] or np.isnan(value).all() for metric, value in nothing.items() if metric in METRICS)
    assert nothing["objects"] == 0
    both = summarise(PROTOCOLS[name], iter([nothing, something]))
    for metric in PROTOCOLS[name].metrics:
        assert both[metric] == summarise(PROTOCOLS[name], [something])[metric]
        assert both[f"videos_{metric}"] == 1
    assert both["videos"] == 2


@pytest.mark.parametrize("name", UNNAMED)
def test_void_pixels_and_frames_change_nothing(name):
    true, rng = two_squares(14), np.random.default_rng(1)
    pred = true > 0 if name in ONE_OBJECT else true.copy()
    true[:, 4], pred[:, 4] = VOID, rng.integers(0, 9, (14, 8)) if pred.dtype != bool else True
    true[12:], pred[12:] = VOID, 0
    if (
        name == "solv-published"
    ):  # ids that occur on void pixels alone are rows of the match too, but here they are last
        pred[:, 4] = rng.integers(0, 3, (14, 8))
    scores = score(name, pred, true)
    all_frames = name in ("davis-2017-unsupervised", "smtc-multi-object")  # void ones are empty there
    assert scores["frames"] == (10 if name == "davis-2016" else 14 if all_frames else 12)
    check(means(name, pred, true), perfect(name))


@pytest.mark.parametrize("name", SEVERAL)
def test_fewer_segments_than_objects(name):
    true = two_squares()
    scores = means(name, np.zeros_like(true), true)  # one segment: IoU 12/48 with either object
    expected = {"miou_video": 1 / 8, "mbo_video": 1 / 4, "mbo_frame": 1 / 4, "fg_ari_frame": 0, "j": 1 / 8, "f": 0}
    check(scores, {metric: value for metric, value in expected.items() if metric in scores})


def test_more_than_twenty_proposals_keep_the_largest():
    true = np.zeros((3, 10, 30), int)
    true[:, 0, 0] = 1
    pred = np.broadcast_to(np.arange(30) + 1, true.shape).copy()
    pred[:, 0, 0] = 99  # perfect, but the smallest of 31 segments
    assert score("davis-2017-unsupervised", pred, true)["j"] == [0]
    for name in ("interpreter", "solv"):
        assert score(name, pred, true)["miou_video"] == [1]
    pred[pred < 12] = 1  # 21 segments: two columns too many ...
    assert score("davis-2017-unsupervised", pred, true)["j"] == [0]
    pred[pred == 12] = 1  # ... 20: all of them are proposed
    assert score("davis-2017-unsupervised", pred, true)["j"] == [1]


def test_ties_are_resolved_the_same_way_every_time():
    true = np.zeros((6, 2, 4), np.uint8)
    true[:, 0] = 1
    pred = np.tile(np.array([[2, 2, 1, 1], [0, 0, 0, 0]]), (6, 1, 1))
    pred[3:, 0] = [1, 1, 2, 2]
    for name in UNNAMED:  # segments 1 and 2 halve the object
        scores = means(name, pred, true)
        expected = {"miou_video": 0.5, "mbo_video": 0.5, "j": 0.5, "identity_switches": 0, "fragmentations": 0}
        check(scores, {metric: value for metric, value in expected.items() if metric in scores})
        assert scores == means(name, pred, true)
    pred[5, 0] = [2, 2, 2, 1]  # now 2 is better; while they were equal it was 1, the smaller id
    assert score("interpreter", pred, true)["identity_switches"] == [1]


def test_a_track_that_is_lost_and_found():
    true = np.zeros((10, 1, 8), np.uint8)
    true[:, 0, :4] = 1
    pred = np.where(true == 1, 2, 0)
    pred[2:4, 0, 1:4] = 0  # a quarter is left: lost in frames 2 and 3
    pred[6, 0, 1:4] = 0
    true[6] = 0  # the object is not there: not lost
    pred[8:, 0, :4] = [7, 8, 9, 10]  # lost for good
    scores = score("interpreter", pred, true)
    assert scores["fragmentations"] == [1]
    assert scores["fragmentations_per_100"] == [pytest.approx(100 / 8)]  # nine frames show the object


def test_clips_follow_the_video_and_incomplete_ones_are_dropped():
    true = two_squares(17)
    pred = true.copy()
    pred[6:12] = 0
    pred[12:] = 5
    scores = score("videosaur", pred, true)
    assert scores["mbo_video"] == [1, 0.25]
    assert (scores["objects"], scores["frames"]) == (4, 12)
    sparse = score("videosaur", pred, true[[0, 7, 13]], frames=[0, 7, 13])
    assert sparse["mbo_video"] == [1, 0.25]
    assert score("videosaur", pred[:5], true[:5])["mbo_video"] == []


def test_davis_2016_leaves_out_the_ends_and_smtc_does_not():
    true = two_squares(5) > 0
    pred = true.copy()
    pred[0], pred[-1] = ~true[0], False
    assert score("davis-2016", pred, true)["j"] == [1]
    assert score("smtc", pred, true)["j"] == [pytest.approx(3 / 5)]
    assert score("davis-2016", pred[:2], true[:2]) == {"j": [], "f": [], "jf": [], "objects": 0, "frames": 0}


def test_background_is_no_segment_but_a_cluster():
    true = two_squares()
    pred = np.array([0, 1, 0])[true]
    check(means("interpreter", pred, true), {"miou_video": (1 + 1 / 3) / 2, "fg_ari_frame": 1})
    scores = means("interpreter", pred, true, background=0)
    check(scores, {"miou_video": 0.5, "mbo_video": 0.5, "miou_frame": 0.5, "fg_ari_frame": 1})
    for name in PROTOCOLS:
        nothing = means(name, np.zeros_like(true), true, background=0)
        if name == "solv-published":  # its code treats every id as a segment: 12 of 48 pixels are object 1
            check(nothing, {"miou_video": 1 / 8, "fg_ari_frame": 0})
        else:
            check(nothing, {metric: 0 for metric in nothing if metric in HIGHER})


def test_summary_weighs_objects_or_videos_as_the_metric_says():
    one, two = two_squares()[:, :, :4], two_squares()
    streamed = (score("interpreter", p, t) for p, t in ((one, one), (np.zeros_like(two), two)))
    summary = summarise(PROTOCOLS["interpreter"], streamed)
    assert (summary["videos"], summary["objects"], summary["frames"]) == (2, 3, 24)
    assert summary["miou_video"] == pytest.approx((1 + 0.25 + 0) / 3)  # objects
    assert summary["mbo_video"] == pytest.approx((1 + 0.25) / 2)  # videos
    nothing = summarise(PROTOCOLS["interpreter"], [])
    assert nothing["videos"] == 0
    assert all(math.isnan(nothing[metric]) for metric in PROTOCOLS["interpreter"].metrics)


def test_annotated_frames_pick_their_predictions():
    true = two_squares(6)
    pred = true.copy()
    pred[[1, 2, 4]] = 0
    assert score("interpreter", pred, true[[0, 3, 5]], frames=[0, 3, 5])["miou_video"] == [1, 1]
    for frames in ([6], [-1], [0, 0], [1, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match="frames"):
            score("interpreter", pred, true[: min(2, len(frames))], frames=frames)


def test_large_videos_are_counted_exactly():
    true = np.repeat(np.arange(4, dtype=np.uint8), 36 * 336 * 126).reshape(36, 336, 504)
    assert score("slot-contrast", true % 3, true)["fg_ari_video"] == 1  # products of pairs pass 2**63


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
        score("interpreter", pred, true)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integers_count_alike(dtype):
    true = two_squares()
    pred = np.roll(true, 1, axis=2)
    for name in PROTOCOLS:
        assert score(name, pred.astype(dtype), true.astype(dtype)) == score(name, pred, true)


def test_sizes_and_resizing():
    assert scoring_size(PROTOCOLS["interpreter"], (720, 1280)) == (336, 504)
    assert scoring_size(PROTOCOLS["interpreter"], (256, 256)) == (336, 336)
    assert scoring_size(PROTOCOLS["solv"], (720, 1280)) == (720, 1280)
    maps = np.arange(12).reshape(1, 3, 4)
    assert np.array_equal(resize_labels(resize_labels(maps, (9, 12)), (3, 4)), maps)
    assert resize_labels(maps, (1, 2)).tolist() == [[[5, 7]]]  # the pixels under the centres
    assert {metric for protocol in PROTOCOLS.values() for metric in protocol.metrics} == set(METRICS)
