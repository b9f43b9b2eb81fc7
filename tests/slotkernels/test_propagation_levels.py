"""Attention propagated through several levels, against A1 @ A2 @ A3 in float64, interpolation and argmax."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from slotkernels import LabelMaps, guided_labels, propagate_attention, propagate_labels, propagate_masks
from slotkernels.propagation import bytes_moved, flops
from slotkernels.propagation.levels import product_of
from torch.utils._python_dispatch import TorchDispatchMode

from .guided_cases import assert_close, images
from .guided_cases import oracle as filtered_oracle
from .label_cases import BACKENDS, ON_GPU
from .oracles import assert_matches_oracle

GRID, SIZE, SLOTS = (3, 5), (13, 17), (6, 5, 4, 3)  # N, K2, K3, K4
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def maps_of(levels, batch=2, frames=3, dtype=torch.float64, device="cpu", shared=()):
    """A1 [B, T, M, N] and A2, …; maps ``shared`` by "frames" or by "all" frames of all videos are expanded."""
    sizes, maps = (GRID[0] * GRID[1], *SLOTS[: levels + 1]), []
    for i, (below, above) in enumerate(pairwise(sizes)):
        how = dict(shared).get(i)
        shape = {None: (batch, frames), "frames": (batch, 1), "all": (1, 1)}[how]
        one = (2 * torch.randn(*shape, below, above, dtype=torch.float64)).softmax(-1)
        maps.append(one.to(device, dtype).expand(batch, frames, -1, -1))
    return maps[0], maps[1:]


def one_map(uppers, clusters=None):
    """A2 @ A3 @ … in float64, and columns of one cluster summed."""
    product = uppers[0].double()
    for upper in uppers[1:]:
        product = product @ upper.double()
    if clusters is None:
        return product
    members = clusters.unsqueeze(2) == torch.arange(clusters.shape[1], device=clusters.device)
    return product @ members.double().unsqueeze(1)


def soft_masks(image, uppers, clusters=None):
    scores = image.double() @ one_map(uppers, clusters)
    masks = F.interpolate(scores.mT.flatten(0, 1).unflatten(2, GRID), SIZE, mode="bilinear", align_corners=False)
    return masks.unflatten(0, image.shape[:2])


CASES = [
    (2, ()),
    (3, ()),
    (2, {1: "all"}),  # A2 alone: nothing to multiply
    (2, {2: "frames"}),
    (3, {2: "frames", 3: "all"}),
    (3, {3: "frames"}),
    (3, {1: "frames", 2: "all", 3: "frames"}),
]


@pytest.mark.parametrize("clustered", [False, True], ids=["", "clusters"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("levels", "shared"), CASES, ids=str)
def test_attention_and_gradients_match_the_product_of_all_levels(levels, shared, dtype, clustered):
    image, uppers = maps_of(levels, dtype=dtype, shared=shared)
    last = SLOTS[levels]
    clusters = torch.randint(-1, 2, (2, last)) if clustered else None
    inputs = {name: t.requires_grad_() for name, t in zip("abcd", (image, *uppers), strict=False)}
    actual = assert_matches_oracle(
        lambda a, **uppers: [propagate_attention(a, [*uppers.values()], clusters)],
        lambda a, **uppers: [a.double() @ one_map([*uppers.values()], clusters)],
        inputs,
        ("masks",),
        2 * TOLERANCE[dtype],
    )
    assert actual["masks"].dtype == dtype


def test_gradcheck():
    image, uppers = maps_of(3, 1, 2)
    clusters = torch.tensor([[0, 1, -1]])
    leaves = [t.contiguous().requires_grad_() for t in (image, *uppers)]
    assert torch.autograd.gradcheck(
        lambda a, *uppers: propagate_attention(a, uppers, clusters), leaves, check_forward_ad=True
    )


def test_gradient_of_a_map_that_frames_share_is_the_sum_over_them():
    image, (first, second) = maps_of(2)
    shared = second[:, :1].clone().requires_grad_()
    propagate_attention(image, [first, shared.expand(2, 3, -1, -1)]).square().sum().backward()
    each = shared.detach().expand(2, 3, -1, -1).clone().requires_grad_()
    (image @ first @ each).square().sum().backward()
    torch.testing.assert_close(shared.grad, each.grad.sum(1, keepdim=True))


@pytest.mark.parametrize("shared", [(), {2: "frames", 3: "all"}], ids=["", "shared"])
@pytest.mark.parametrize("clustered", [False, True], ids=["", "clusters"])
@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_labels_equal_product_interpolation_argmax(backend, device, clustered, shared):
    image, uppers = maps_of(3, dtype=torch.float32, device=device, shared=shared)
    clusters = torch.tensor([[0, 1, 0], [1, -1, 0]], device=device) if clustered else None
    masks = soft_masks(image, uppers, clusters)
    best = masks.topk(2, 2).values
    options = {"clusters": clusters, "statistics": True, "confidence": True, "backend": backend}
    maps = propagate_labels(image, uppers, GRID, SIZE, **options)
    clear = best[:, :, 0] - best[:, :, 1] > 2e-5
    assert clear.double().mean() > 0.95
    assert torch.equal(maps.labels[clear].long(), masks.argmax(2)[clear])
    torch.testing.assert_close(maps.confidence.double(), best[:, :, 0] - best[:, :, 1], rtol=2**-10, atol=2e-5)
    assert maps.areas.sum() == maps.labels.numel()
    guide = images(2, 3, SIZE).to(device)
    guided = guided_labels(image, uppers, GRID, guide, **options)
    assert_close(guided, filtered_oracle(image, one_map(uppers), GRID, guide, radius=None, clusters=clusters))


@pytest.mark.parametrize("clustered", [False, True], ids=["", "clusters"])
def test_masks_match_product_and_interpolation(clustered):
    image, uppers = maps_of(3, shared={2: "frames"})
    clusters = torch.tensor([[0, 1, 0], [1, -1, 0]]) if clustered else None
    masks = propagate_masks(image, uppers, GRID, SIZE, objects=[2, 0], clusters=clusters)
    torch.testing.assert_close(masks, soft_masks(image, uppers, clusters)[:, :, [2, 0]])


GUIDE = torch.randint(0, 256, (2, 3, *SIZE, 3), dtype=torch.uint8)
FUNCTIONS = {
    "propagate_attention": propagate_attention,
    "propagate_labels": partial(propagate_labels, grid=GRID, size=SIZE),
    "propagate_labels with extras": partial(propagate_labels, grid=GRID, size=SIZE, confidence=True, statistics=True),
    "propagate_masks": partial(propagate_masks, grid=GRID, size=SIZE, objects=[0, 2]),
    "guided_labels": partial(guided_labels, grid=GRID, guide=GUIDE),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sequence_of_one_is_the_tensor_bit_for_bit(name, dtype):
    image, (video,) = maps_of(1, dtype=dtype)
    for clusters in (None, torch.randint(-1, 3, (2, 5))):
        one, other = (FUNCTIONS[name](image, v, clusters=clusters) for v in (video, [video]))
        pairs = zip(one, other, strict=True) if isinstance(one, LabelMaps) else [(one, other)]
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("filler", [1e30, float("inf"), float("nan")])
def test_dropped_slots_of_the_last_level_change_nothing(filler):
    image, (first, second) = maps_of(2)
    clusters, results = torch.tensor([[0, -1, 1, 0], [1, 0, 4, -1]]), []
    dropped = (clusters < 0) | (clusters > 3)
    for hidden in (0.5, filler):
        uppers = [first.clone(), second.masked_fill(dropped[:, None, None], hidden)]
        leaves = [t.requires_grad_() for t in (image.clone(), *uppers)]
        masks = propagate_attention(leaves[0], leaves[1:], clusters)
        grads = torch.autograd.grad(masks.square().sum(), leaves)
        labels = [FUNCTIONS[name](image, uppers, clusters=clusters) for name in ("propagate_labels", "guided_labels")]
        results.append([masks, *grads, *labels])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation creates; expanded views count as they are stored."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().size() // result.itemsize)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_map_that_many_frames_share_is_never_copied(dtype):
    """No product of the size of A1 is formed: the largest new tensor is the lowest map in fp32."""
    frames, slots, objects = 50, 4, 16
    first = torch.rand(2, frames, slots, objects).to(dtype)
    uppers = [torch.rand(2, 1, objects, objects).to(dtype).expand(2, frames, -1, -1) for _ in range(2)]
    with Largest() as largest:
        product = product_of((first, *uppers), torch.zeros(2, objects, dtype=torch.int64))
    assert product.shape == first.shape
    assert largest.numbers == first.numel()


def test_compiles_fullgraph():
    image, uppers = maps_of(3, dtype=torch.float32, shared={2: "frames", 3: "all"})
    clusters = torch.tensor([[0, 1, 0], [0, -1, 1]])

    def everything(image, uppers):
        return [
            function(image, uppers, clusters=clusters) for name, function in FUNCTIONS.items() if "mask" not in name
        ]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, uppers), everything(image, uppers), rtol=0, atol=0)


def test_transforms_of_torch_func():
    image, (first, second) = maps_of(2)
    mapped = torch.vmap(lambda a, *uppers: propagate_attention(a[None], [u[None] for u in uppers])[0])
    torch.testing.assert_close(mapped(image, first, second), image @ first @ second)

    def of_shared(shared):
        return propagate_attention(image, [first, shared.expand(2, 3, -1, -1)])

    shared, tangent = second[:, :1], second[:, 1:2]
    _, moved = torch.func.jvp(of_shared, (shared,), (tangent,))
    torch.testing.assert_close(moved, image @ first @ tangent)
    with pytest.raises(RuntimeError, match=r"propagate_masks: .*propagate_attention"):
        torch.func.grad(lambda v: propagate_masks(image, [first, v], GRID, objects=[1]).sum())(second)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_name_the_map_that_disagrees(name):
    image, (first, second, third) = maps_of(3, dtype=torch.float32)
    op, function = name.split()[0], FUNCTIONS[name]
    for uppers, message in (
        ([first, third], r"video_attention\[1\] is float32 \[2, 3, 4, 3\], expected \[B, T, K2, K3\] with K2 = 5"),
        ([first, second, second], r"video_attention\[2\] is .*, expected \[B, T, K3, K4\] with K3 = 4"),
        ([second, third], r"video_attention\[0\] is .*, expected \[B, T, N, K2\] with N = 6"),
        ([first, second[:, :2]], r"video_attention\[1\] is .*, expected \[B, T, K2, K3\] with T = 3"),
        ([first, second[0]], r"video_attention\[1\] is float32 \[3, 5, 4\], expected \[B, T, K2, K3\]"),
        ([first, second.to("meta")], r"video_attention\[1\] is on meta, expected cpu"),
        ([], r"video_attention is empty, expected \[B, T, N, K2\]"),
    ):
        with pytest.raises(ValueError, match=f"{op}: {message}"):
            function(image, uppers)
    with pytest.raises(ValueError, match=rf"{op}: clusters is int64 \[2, 5\], expected \[B, K3\] with K3 = 4"):
        function(image, [first, second], clusters=torch.zeros(2, 5, dtype=torch.int64))


def test_labels_of_the_last_level_are_bytes():
    """Levels below it may have more slots."""
    image, first = torch.rand(1, 1, 15, 2), torch.rand(1, 1, 2, 300)
    assert propagate_labels(image, [first, torch.rand(1, 1, 300, 2)], GRID).shape == (1, 1, *GRID)
    with pytest.raises(ValueError, match=r"video_attention\[1\] is .*\[1, 1, 300, 256\], expected K <= 255"):
        propagate_labels(image, [first, torch.rand(1, 1, 300, 256)], GRID)


def test_cost_formulas():
    assert bytes_moved(1, 2, 3, 4, (5, 7), 6) == 2 * (4 * (3 * 4 + 4 * 5 + 5 * 7) + 6)
    assert flops(1, 2, 3, 4, (5, 7), 6) == 2 * 7 * (2 * (3 * 4 + 4 * 5) + 18)
