import pytest
import torch
import torch.nn.functional as F
from slotkernels import propagate_attention, propagate_labels
from slotkernels.propagation import bytes_moved, flops, reference

# B, T, (h, w), N, K, (H, W)
CASES = [
    (2, 3, (4, 6), 5, 3, (17, 23)),
    (1, 1, (1, 1), 1, 1, (3, 5)),
    (1, 2, (1, 7), 33, 20, (6, 30)),
    (2, 1, (5, 4), 3, 255, (5, 4)),
    (1, 2, (6, 6), 4, 8, (3, 2)),
]


def make(case, dtype=torch.float64):
    batch, frames, (h, w), slots, video_slots, _ = case
    image = (2 * torch.randn(batch, frames, h * w, slots, dtype=torch.float64)).softmax(-1)
    video = (2 * torch.randn(batch, frames, slots, video_slots, dtype=torch.float64)).softmax(-1)
    return image.to(dtype), video.to(dtype)


def oracle(image, video, grid, size):
    """Float64 soft masks [B, T, K, H, W], all at once."""
    masks = (image.double() @ video.double()).transpose(-1, -2).flatten(0, 1).unflatten(-1, grid)
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
    return masks.unflatten(0, image.shape[:2])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The product and the interpolation are fp32 whatever the input: scores in [0, 1] carry a few times 6e-8.
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
)
def test_labels_equal_product_interpolation_argmax(case, dtype, tolerance):
    *_, grid, _, _, size = case
    image, video = make(case, dtype)
    labels = propagate_labels(image, video, grid, size)
    masks = oracle(image, video, grid, size)
    assert labels.dtype == torch.uint8
    assert labels.shape == (*image.shape[:2], *size)
    chosen = masks.gather(2, labels.long().unsqueeze(2)).squeeze(2)
    # Another label than the oracle's is allowed only where the two scores are within the tolerance.
    assert (masks.amax(2) - chosen).max() <= tolerance
    assert (labels != masks.argmax(2)).double().mean() < 1e-3


def test_patch_resolution_is_the_argmax_of_propagated_attention():
    image, video = make(CASES[0])
    labels = propagate_labels(image, video, (4, 6))
    assert torch.equal(labels.flatten(2).long(), propagate_attention(image, video).argmax(-1))


def test_ties_go_to_the_lowest_index():
    image, video = torch.ones(1, 1, 6, 1), torch.full((1, 1, 1, 7), 1 / 7)
    assert (propagate_labels(image, video, (2, 3), (9, 8)) == 0).all()
    video[..., 0] = 0
    assert (propagate_labels(image, video, (2, 3), (9, 8)) == 1).all()


def test_grouping_of_frames_does_not_change_labels(monkeypatch):
    case = (2, 5, (4, 6), 5, 3, (17, 23))
    image, video = make(case, torch.float32)
    expected = propagate_labels(image, video, (4, 6), (17, 23))
    one_frame = 3 * 17 * 23 * 4
    for limit in (1, 3 * one_frame):
        monkeypatch.setattr(reference, "CHUNK_BYTES", limit)
        assert torch.equal(propagate_labels(image, video, (4, 6), (17, 23)), expected)


def test_soft_masks_never_exist_together(monkeypatch):
    image, video = make((1, 6, (4, 4), 5, 3, (8, 8)), torch.float32)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2 * 3 * 8 * 8 * 4)
    frames = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda masks, *a, **k: frames.append(len(masks)) or interpolate(masks, *a, **k)
    )
    propagate_labels(image, video, (4, 4), (8, 8))
    assert frames == [2, 2, 2]


def test_attention_is_the_product_and_keeps_rows_normalised():
    image, video = make(CASES[0])
    image.requires_grad_()
    video.requires_grad_()
    attention = propagate_attention(image, video)
    torch.testing.assert_close(attention, torch.einsum("btmn,btnk->btmk", image, video))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 24).double())
    cotangent = torch.randn(attention.shape, dtype=torch.float64)
    grads = torch.autograd.grad(attention, (image, video), cotangent)
    torch.testing.assert_close(grads[0], cotangent @ video.transpose(-1, -2))
    torch.testing.assert_close(grads[1], image.transpose(-1, -2) @ cotangent)


def test_mixed_precision_strided_and_empty_input():
    image, video = make(CASES[0])
    strided = image.transpose(2, 3).contiguous().transpose(2, 3)
    expected = propagate_labels(image, video, (4, 6), (9, 9))
    assert torch.equal(propagate_labels(strided, video, (4, 6), (9, 9)), expected)
    assert propagate_attention(image.bfloat16(), video).dtype == torch.bfloat16
    assert propagate_labels(image[:0], video[:0], (4, 6), (9, 9)).shape == (0, 3, 9, 9)
    assert propagate_labels(image[:, :0], video[:, :0], (4, 6), (9, 9)).shape == (2, 0, 9, 9)


def test_opcheck():
    torch.library.opcheck(torch.ops.slotkernels.propagate_labels, (*make(CASES[0]), 4, 6, 17, 23, "auto"))


def test_compiles_fullgraph():
    image, video = make(CASES[0])
    compiled = torch.compile(propagate_labels, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, video, (4, 6), (17, 23)), propagate_labels(image, video, (4, 6), (17, 23)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_attention": torch.zeros(2, 6, 3)}, r"image_attention is float32 \[2, 6, 3\], expected \[B, T, M, N\]"),
        ({"video_attention": torch.zeros(1, 2, 4, 5)}, r"video_attention is .* with N = 3"),
        ({"video_attention": torch.zeros(1, 2, 3, 256)}, r"video_attention is .*\[1, 2, 3, 256\], expected K <= 255"),
        ({"grid": (2, 4)}, r"grid=\(2, 4\), expected h \* w = 6"),
        ({"grid": (-2, -3)}, r"grid=\(-2, -3\)"),
        ({"size": (0, 4)}, r"size=\(0, 4\), expected \(H, W\) > 0"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(arguments, message):
    good = {"image_attention": torch.zeros(1, 2, 6, 3), "video_attention": torch.zeros(1, 2, 3, 5), "grid": (2, 3)}
    with pytest.raises(ValueError, match=message):
        propagate_labels(**(good | arguments))


def test_cost_formulas():
    assert bytes_moved(1, 2, 3, 4, 5, 6) == 2 * (4 * 4 * 8 + 6)
    assert flops(1, 2, 3, 4, 5, 6) == 2 * 5 * (24 + 48)
