"""Manual corrections, compared with their definition on the soft masks."""

import numpy as np
import pytest
import torch

from interpreter.app import corrections
from interpreter.app.corrections import TokenKeeper, uncorrected
from interpreter.segmentation import Segmentation

GRID, FRAMES = (4, 6), 70  # more frames than are computed at once
EXACT = "donot_use_mm_for_euclid_dist"


def random_masks(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).mul(4).softmax(-1)


@pytest.fixture(params=["masks", "slots"])
def segments(request):
    """Five segments: as masks of tokens, or as slots of frames over segments."""
    if request.param == "masks":
        return uncorrected(Segmentation(GRID, random_masks(FRAMES, 24, 5).half()))
    return uncorrected(Segmentation(GRID, random_masks(FRAMES, 24, 7).half(), random_masks(FRAMES, 7, 5, seed=1)))


def areas(masks):
    return np.bincount(masks.argmax(-1).flatten(), minlength=masks.shape[-1]) / masks[..., 0].numel()


def test_merged_segments_have_the_sum_of_their_masks(segments):
    before = segments.segmentation.masks()
    after = corrections.merge(segments, [4, 2, 2])
    assert after.ids == (1, 2, 3, 5)
    expected = torch.stack([before[..., 0], before[..., 1] + before[..., 3], before[..., 2], before[..., 4]], -1)
    torch.testing.assert_close(after.segmentation.masks(), expected, atol=2e-3, rtol=0)  # fp16 attention
    np.testing.assert_allclose(after.areas, areas(after.segmentation.masks()))
    assert (segments.ids, sum(after.areas)) == ((1, 2, 3, 4, 5), pytest.approx(1))


def test_pixels_between_two_halves_go_to_their_merge():
    """A relabelled map would keep the pixel for the third segment, which has the largest single mask."""
    thirds = Segmentation((1, 1), torch.tensor([[[0.32, 0.30, 0.38]]]).half())
    assert thirds.labels().item() == 2
    merged = corrections.merge(uncorrected(thirds), [1, 2])
    assert merged.ids[merged.segmentation.labels().item()] == 1


def test_merging_keeps_names_and_numbers(segments):
    named = corrections.name(corrections.name(segments, 3, "  the\n dog "), 5, "cat")
    assert corrections.merge(named, [1, 3]).names == {1: "the dog", 5: "cat"}
    assert corrections.merge(named, [3, 5]).names == {3: "the dog"}
    again = corrections.merge(corrections.merge(named, [1, 3]), [4, 5])
    assert (again.ids, again.names) == ((1, 2, 4), {1: "the dog", 4: "cat"})
    assert corrections.name(named, 3, " ").names == {5: "cat"}


def test_a_merged_segment_is_hidden_as_its_first(segments):
    hidden = corrections.show(segments, [2, 3], shown=False)
    assert corrections.merge(hidden, [1, 2]).hidden == {3}
    assert corrections.merge(hidden, [2, 4]).hidden == {2, 3}
    assert corrections.show(hidden, [2], shown=True).hidden == {3}


def blobs(grid=GRID, frames=FRAMES):
    """Tokens of two kinds: one in the left half of the patches, one in the right half."""
    right = torch.arange(grid[1]).ge(grid[1] // 2).repeat(grid[0])
    tokens = torch.randn(frames, len(right), 8, generator=torch.Generator().manual_seed(2)) * 0.05
    tokens[..., 0] += right.float()
    return tokens, right


def test_splitting_parts_what_looks_different(segments):
    tokens, right = blobs()
    before = segments.segmentation.masks()
    after = corrections.split(segments, 3, tokens)
    assert after.ids == (1, 2, 3, 4, 5, 6)
    masks = after.segmentation.masks()
    torch.testing.assert_close(masks[..., 2] + masks[..., 5], before[..., 2], atol=2e-3, rtol=0)
    torch.testing.assert_close(masks[..., [0, 1, 3, 4]], before[..., [0, 1, 3, 4]], atol=1e-3, rtol=0)
    side = (masks[..., 5] > masks[..., 2])[..., :]
    assert (side == right).all() or (side == ~right).all()
    assert masks[..., 2].sum() >= masks[..., 5].sum()  # the larger part keeps the number
    np.testing.assert_allclose(after.areas, areas(masks), atol=1e-6)


def test_splitting_parts_two_objects_that_look_alike():
    masks = torch.full((8, 24, 2), 1e-4)
    apart = [0, 1, 6, 7, 16, 17, 22, 23]  # two corners
    masks[:, :, 0] = 1
    masks[:, apart] = torch.tensor([1e-4, 1.0])
    segments = uncorrected(Segmentation(GRID, masks.half()))
    tokens = torch.randn(8, 24, 8, generator=torch.Generator().manual_seed(3)) * 1e-4  # nothing but noise
    after = corrections.split(segments, 2, tokens).segmentation.labels().reshape(8, 24)
    first, second = after[:, [0, 1, 6, 7]], after[:, [16, 17, 22, 23]]
    assert len(np.unique(first)) == len(np.unique(second)) == 1
    assert first[0, 0] != second[0, 0]


def test_a_split_begins_in_the_frame_that_is_shown():
    """In the whole video the segment splits into early and late frames; in frame 3, into left and right."""
    tokens, right = blobs(frames=8)
    tokens[4:, :, 1] += 3.0
    segments = uncorrected(Segmentation(GRID, torch.ones(8, 24, 1).half()))
    later = corrections.split(segments, 1, tokens, frame=3).segmentation.labels().reshape(8, 24)
    assert len(np.unique(later[3][right])) == len(np.unique(later[3][~right])) == 1
    assert later[3][right][0] != later[3][~right][0]
    absent = torch.ones(8, 24, 2).half()
    absent[3, :, 0] = 0
    absent[[0, 1, 2, 4, 5, 6, 7], :, 1] = 0
    apart = corrections.split(uncorrected(Segmentation(GRID, absent)), 1, tokens, frame=3)  # it is not in that frame
    assert len(np.unique(apart.segmentation.labels())) == 3


def test_a_split_can_be_merged_again(segments):
    tokens, _ = blobs()
    again = corrections.merge(corrections.split(segments, 3, tokens), [3, 6])
    assert again.ids == segments.ids
    torch.testing.assert_close(again.segmentation.masks(), segments.segmentation.masks(), atol=2e-3, rtol=0)
    assert corrections.split(again, 1, tokens).ids[-1] == 7  # a number is never given twice


def test_a_part_of_a_hidden_segment_is_hidden(segments):
    hidden = corrections.show(segments, [3], shown=False)
    assert corrections.split(hidden, 3, blobs()[0]).hidden == {3, 6}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: corrections.merge(s, [1]), "select two segments"),
        (lambda s: corrections.merge(s, [1, 1]), "select two segments"),
        (lambda s: corrections.merge(s, [1, 9]), "no segment 9"),
        (lambda s: corrections.show(s, [0], shown=True), "no segment 0"),
        (lambda s: corrections.name(s, 6, "x"), "no segment 6"),
        (lambda s: corrections.split(s, 6, blobs()[0]), "no segment 6"),
        (lambda s: corrections.split(s, 1, torch.zeros(FRAMES, 24, 8)), None),
    ],
)
def test_what_cannot_be_corrected_is_refused(segments, edit, message):
    if message is None:  # equal tokens are split by their positions
        assert len(edit(segments).ids) == 6
    else:
        with pytest.raises(ValueError, match=message):
            edit(segments)


def test_more_segments_than_numbers_are_refused():
    many = Segmentation((1, 1), torch.full((1, 1, 255), 1 / 255).half())
    with pytest.raises(ValueError, match="255 segments"):
        uncorrected(many)
    most = uncorrected(Segmentation((1, 2), torch.full((1, 2, 254), 1 / 254).half()))
    with pytest.raises(ValueError, match="254 is the highest"):
        corrections.split(most, 1, torch.zeros(1, 2, 4))


def test_a_segment_of_one_patch_is_not_split():
    masks = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).half()
    with pytest.raises(ValueError, match="too few patches"):
        corrections.split(uncorrected(Segmentation((1, 2), masks)), 1, torch.zeros(1, 2, 4))


def test_kept_tokens_have_the_distances_of_the_features():
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(96, 40, generator=generator)).Q
    features = torch.randn(9, 24, 40, generator=generator) @ basis.mT + 3  # 40 directions of 96, not centred
    keeper = TokenKeeper(9)
    for chunk in features.split(4):
        keeper.keep(chunk)
    assert keeper.tokens.shape == (9, 24, 64)
    kept, true = (torch.cdist(*[x.flatten(0, 1).float()] * 2, compute_mode=EXACT) for x in (keeper.tokens, features))
    torch.testing.assert_close(kept, true, atol=2e-2, rtol=5e-3)  # fp16


def test_a_keeper_takes_no_more_frames_than_the_video_has():
    keeper = TokenKeeper(3)
    for _ in range(2):
        keeper.keep(torch.randn(2, 4, 5))
    assert keeper.tokens.shape == (3, 4, 5)
