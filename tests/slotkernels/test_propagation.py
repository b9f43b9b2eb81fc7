"""Propagated attention and soft masks, and the checks that all three functions share."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slotkernels import cluster_slots, merge_slots, propagate_attention, propagate_labels, propagate_masks
from slotkernels.propagation import bytes_moved, flops

from .oracles import assert_matches_oracle

CASES = [(2, 3, 24, 5, 3), (1, 1, 1, 1, 1), (1, 2, 7, 33, 20), (2, 1, 863, 3, 255), (0, 3, 4, 2, 2), (2, 0, 4, 2, 2)]
# Sums of up to 863 terms in fp32; half types are rounded once more, to 8 or 11 bits.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make(case, dtype=torch.float64, grad=False):
    batch, frames, tokens, slots, video_slots = case
    image = (2 * torch.randn(batch, frames, tokens, slots, dtype=torch.float64)).softmax(-1)
    video = (2 * torch.randn(batch, frames, slots, video_slots, dtype=torch.float64)).softmax(-1)
    return image.to(dtype).requires_grad_(grad), video.to(dtype).requires_grad_(grad)


def random_clusters(case):
    """Clusters with several members, with one, dropped slots and missing clusters."""
    return torch.randint(-1, max(1, case[4] // 2), (case[0], case[4]))


def oracle(image, video, clusters):
    """The product, then the sum of the columns of each cluster in a loop, in float64."""
    product = image.double() @ video.double()
    if clusters is None:
        return product
    columns = []
    for c in range(clusters.shape[1]):
        members = (clusters == c).double()[:, None, None, :]
        columns.append((product * members).sum(-1))
    return torch.stack(columns, -1)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_gradients_match_the_merged_product(case, dtype, merged):
    image, video = make(case, dtype, grad=True)
    clusters = random_clusters(case) if merged else None
    actual = assert_matches_oracle(
        lambda image, video: [propagate_attention(image, video, clusters)],
        lambda image, video: [oracle(image, video, clusters)],
        {"image": image, "video": video},
        ("masks",),
        2 * TOLERANCE[dtype],
    )
    assert actual["masks"].dtype == dtype


@pytest.mark.parametrize("merged", [False, True])
def test_gradcheck(merged):
    case = (2, 2, 6, 4, 5)
    clusters = torch.tensor([[0, 1, 0, -1, 2], [0, 0, 1, 1, 1]]) if merged else None
    assert torch.autograd.gradcheck(lambda a, b: propagate_attention(a, b, clusters), make(case, grad=True))


@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_one_side_alone(side):
    image, video = make((2, 3, 24, 5, 3))
    leaves = [image, video]
    leaves[side].requires_grad_()
    propagate_attention(*leaves).square().sum().backward()
    assert leaves[side].grad.shape == leaves[side].shape
    assert leaves[1 - side].grad is None


def test_clusters_do_what_merging_the_slots_first_does():
    """The attention of video slots, merged by the video stage and then propagated."""
    case = (3, 2, 10, 6, 5)
    image, video = make(case)
    slots = torch.randn(3, 5, 4, dtype=torch.float64)
    clusters, counts = cluster_slots(slots, 0.9)
    assert counts.min() < 5
    _, merged, valid = merge_slots(slots, video.flatten(1, 2), clusters)
    folded = propagate_attention(image, video, clusters)
    torch.testing.assert_close(folded, propagate_attention(image, merged.unflatten(1, (2, 6))))
    torch.testing.assert_close(folded.sum(-1), torch.ones(3, 2, 10).double())
    assert (folded.amax((1, 2)) > 0).equal(valid)


@settings(max_examples=40)
@given(st.data())
def test_any_shape_layout_and_labels(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))  # so that examples do not depend on earlier ones
    case = tuple(data.draw(st.integers(low, high)) for low, high in ((0, 3), (0, 3), (1, 9), (1, 9), (1, 9)))
    image, video = make(case)
    if data.draw(st.booleans()):
        image, video = image.mT.contiguous().mT, video.transpose(0, 1).contiguous().transpose(0, 1)
    clusters = torch.randint(-2, case[4] + 2, (case[0], case[4])) if data.draw(st.booleans()) else None
    torch.testing.assert_close(propagate_attention(image, video, clusters), oracle(image, video, clusters))


def test_mixed_precision():
    image, video = make((2, 3, 24, 5, 3), torch.float32, grad=True)
    actual = propagate_attention(image.bfloat16(), video)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), image @ video, rtol=2**-7, atol=0)  # both operands rounded to 8 bits
    grad = torch.autograd.grad(actual.sum(), video)[0]
    assert grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- soft masks


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [(17, 23), (4, 6), (3, 2), None], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_masks_match_product_and_interpolation(size, merged, dtype):
    case = (2, 3, 24, 5, 7)
    image, video = make(case, dtype)
    clusters = random_clusters(case) if merged else None
    objects = [5, 0, 5]
    masks = propagate_masks(image, video, (4, 6), size, objects=objects, clusters=clusters)
    expected = oracle(image, video, clusters)[..., objects].mT.flatten(0, 1).unflatten(2, (4, 6))
    expected = F.interpolate(expected, size or (4, 6), mode="bilinear", align_corners=False).unflatten(0, (2, 3))
    assert masks.dtype == dtype
    # Half types are rounded after the product and after the interpolation.
    absolute = 0 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(masks.double(), expected, rtol=2 * TOLERANCE[dtype], atol=absolute)


def test_the_largest_mask_gives_the_label():
    image, video = make((2, 3, 24, 5, 7), torch.float32)
    masks = propagate_masks(image, video, (4, 6), (17, 23), objects=range(7))
    labels = propagate_labels(image, video, (4, 6), (17, 23))
    chosen = masks.gather(2, labels.long().unsqueeze(2)).squeeze(2)
    assert (masks.amax(2) - chosen).max() < 1e-6


def test_masks_of_empty_batches_and_strided_input():
    image, video = make((2, 3, 24, 5, 7), torch.float32)
    expected = propagate_masks(image, video, (4, 6), (9, 9), objects=[1])
    strided = image.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(propagate_masks(strided, video, (4, 6), (9, 9), objects=[1]), expected)
    assert propagate_masks(image[:0], video[:0], (4, 6), (9, 9), objects=[1]).shape == (0, 3, 1, 9, 9)
    assert propagate_masks(image[:, :0], video[:, :0], (4, 6), (9, 9), objects=[1]).shape == (2, 0, 1, 9, 9)


# -------------------------------------------------------------------------------------------- registration and errors


@pytest.mark.parametrize("clusters", [None, torch.tensor([[0, 1, 0], [0, -1, 1]])], ids=["", "merged"])
def test_opcheck(clusters):
    image, video = make((2, 3, 24, 5, 3))
    ops, maps = torch.ops.slotkernels, (4, 6, 17, 23)
    torch.library.opcheck(ops.propagate_masks, (image, video, clusters, *maps, [2, 0], "auto"))
    for extras in ((False, False), (True, False), (False, True)):
        for maps_of in (image, image.float()):  # the reference, and C++ where it is built
            torch.library.opcheck(ops.propagate_labels, (maps_of, video.to(maps_of), clusters, *maps, *extras, "auto"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compiles_fullgraph(dtype):
    image, video = make((2, 3, 24, 5, 3), dtype, grad=True)
    clusters = torch.tensor([[0, 1, 0], [0, -1, 1]])

    def everything(image, video):
        attention = propagate_attention(image, video, clusters)
        maps = propagate_labels(image, video, (4, 6), (17, 23), clusters=clusters, confidence=True, statistics=True)
        masks = propagate_masks(image, video, (4, 6), (17, 23), objects=[1, 0])
        return attention, masks, *maps, propagate_labels(image, video, (4, 6))

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(image, video), everything(image, video)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    grads = [torch.autograd.grad(out[0].square().sum(), (image, video)) for out in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


GOOD = {"image_attention": torch.zeros(1, 2, 6, 3), "video_attention": torch.zeros(1, 2, 3, 5)}
ON_MAPS = [
    ({"grid": (2, 4)}, r"grid=\(2, 4\), expected h \* w = 6"),
    ({"grid": (-2, -3)}, r"grid=\(-2, -3\)"),
    ({"size": (0, 4)}, r"size=\(0, 4\), expected \(H, W\) > 0"),
    ({"size": (1 << 16, 1 << 15)}, r"less than 2\^31 pixels"),
]


ON_ALL = [
    ({"image_attention": torch.zeros(2, 6, 3)}, r"image_attention is float32 \[2, 6, 3\], expected \[B, T, M, N\]"),
    ({"image_attention": torch.zeros(1, 2, 6, 3).int()}, "image_attention is int32"),
    ({"video_attention": torch.zeros(1, 2, 4, 5)}, r"video_attention is .* with N = 3"),
    ({"clusters": torch.zeros(1, 4).long()}, r"clusters is int64 \[1, 4\], expected \[B, K\] with K = 5"),
    ({"clusters": torch.zeros(1, 5)}, r"clusters is float32 \[1, 5\], expected dtype int64"),
    ({"clusters": torch.zeros(1, 5, dtype=torch.int64, device="meta")}, "clusters is on meta, expected cpu"),
    ({"backend": "cuda"}, "backend 'cuda' cannot serve this call"),
]
FUNCTIONS: list[tuple[Any, dict[str, Any], Any]] = [
    (propagate_attention, {}, ON_ALL),
    (propagate_labels, {"grid": (2, 3)}, ON_ALL + ON_MAPS),
    (propagate_masks, {"grid": (2, 3), "objects": [0]}, ON_ALL + ON_MAPS),
]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [(function, GOOD | own | bad, message) for function, own, cases in FUNCTIONS for bad, message in cases],
)
def test_bad_input_is_an_error_that_names_it(function, arguments, message):
    with pytest.raises(RuntimeError if "backend" in arguments else ValueError, match=message):
        function(**arguments)


def test_errors_of_labels_and_masks_alone():
    many = {"video_attention": torch.zeros(1, 2, 3, 256), "grid": (2, 3)}
    with pytest.raises(ValueError, match=r"video_attention is .*\[1, 2, 3, 256\], expected K <= 255"):
        propagate_labels(**(GOOD | many))
    for objects in ([], [5], [-1]):
        with pytest.raises(ValueError, match=r"objects=\[.*\], expected some of 0\.\.4"):
            propagate_masks(**GOOD, grid=(2, 3), objects=objects)


@pytest.mark.parametrize(
    ("function", "arguments"), [pytest.param(function, own, id=function.__name__) for function, own, _ in FUNCTIONS]
)
def test_the_old_name_of_clusters_warns_and_still_works(function, arguments):
    image, video = make((1, 2, 6, 3, 5))
    clusters = torch.tensor([[0, 1, 0, -1, 1]])
    expected = function(image, video, **arguments, clusters=clusters)
    with pytest.warns(DeprecationWarning, match=rf"{function.__name__}: labels= is now called clusters=") as warned:
        actual = function(image, video, **arguments, labels=clusters)
    assert torch.equal(actual, expected)
    assert warned[0].filename == __file__
    with pytest.raises(ValueError, match="labels is the former name of clusters"):
        function(image, video, **arguments, clusters=clusters, labels=clusters)


def test_cost_formulas():
    assert bytes_moved(1, 2, 3, 4, 5, 6) == 2 * (4 * 4 * 8 + 6)
    assert bytes_moved(1, 2, 3, 4, 5, 6, itemsize=2, confidence=True, statistics=True) == 2 * (2 * 4 * 8 + 18 + 100)
    assert flops(1, 2, 3, 4, 5, 6) == 2 * 5 * (24 + 18)
