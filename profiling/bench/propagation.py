"""Attention propagation: the product, and label maps, compared with product, interpolation and argmax in PyTorch."""

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import propagate_attention, propagate_labels
from slotkernels.propagation import bytes_moved, flops
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Judge, Outputs, WrongResult, close_to

VIDEO = (36, (24, 36), 32, 8, (336, 504))  # frames, patch grid, image slots, video slots, pixels: YTVIS-19
SHAPES: tuple[tuple[Any, str], ...] = (
    (VIDEO, "objects"),
    (VIDEO, "noise"),
    ((24, (24, 24), 32, 20, (336, 336)), "objects"),  # MOVi-E
    ((8, (24, 36), 32, 8, (720, 1280)), "objects"),  # HD
    ((36, (24, 36), 32, (16, 8), (336, 504)), "objects"),  # three levels: K2 video slots, and K3 above them
)


def noise(frames: int, grid: tuple[int, int], slots: int, objects: int) -> tuple[Tensor, Tensor]:
    """Attention in which neighbouring patches are independent."""
    image = torch.randn(1, frames, grid[0] * grid[1], slots)
    return (2 * image).softmax(-1), (2 * torch.randn(1, frames, slots, objects)).softmax(-1)


def blobs(frames: int, grid: tuple[int, int], slots: int, objects: int) -> tuple[Tensor, Tensor]:
    """Each slot is a blob that moves and mostly belongs to one object."""
    h, w = grid
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float().unsqueeze(1)  # [M, 1, 2]
    time = torch.arange(frames).view(frames, 1, 1, 1) / 36
    start, speed = torch.rand(slots, 2), 0.3 * torch.randn(slots, 2)
    centres = (start + speed * time) % 1 * torch.tensor([h, w])  # [T, 1, N, 2]
    image = (-(places - centres).square().sum(-1) / 6).softmax(-1)
    video = (6 * torch.randn(1, slots, objects) + torch.randn(frames, slots, objects)).softmax(-1)
    return image.unsqueeze(0), video.unsqueeze(0)


def shared_levels(frames: int, slots: tuple[int, ...], device: str) -> list[Tensor]:
    """Attention [1, T, K2, K3], … of the levels above the video slots, each one map that all frames share."""
    shared = [(4 * torch.randn(1, 1, *pair, device=device)).softmax(-1) for pair in pairwise(slots)]
    return [level.expand(1, frames, -1, -1) for level in shared]


def exact_labels(image: Tensor, video: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Labels [T, H, W] in float64, and where the two best scores differ by more than rounding."""
    labels, clear = [], []
    for one, other in zip(image[0].double(), video[0].double(), strict=True):
        masks = (one @ other).T.unflatten(1, grid).unsqueeze(0)
        best = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0].topk(2, 0)
        labels.append(best.indices[0].to(torch.uint8))
        clear.append(best.values[0] - best.values[1] > (image.shape[3] + 2 * sum(grid) + 16) * 1.2e-7)
    return torch.stack(labels), torch.stack(clear)


def label_cases(device: str) -> Iterator[Case]:
    """Sizes of YTVIS-19, MOVi-E and HD; attention as in a segmentation, and noise, the worst case; three levels."""
    for (frames, grid, slots, objects, size), kind in SHAPES:
        above = (objects,) if isinstance(objects, int) else objects  # slots of the levels, from the lowest up

        def inputs(
            kind: str = kind, arguments: Any = (frames, grid, slots, above[0]), above: Any = above
        ) -> tuple[Tensor, ...]:
            maps = {"noise": noise, "objects": blobs}[kind](*arguments)
            return (*(t.to(device) for t in maps), *shared_levels(arguments[0], above, device))

        def chain(image: Tensor, *levels: Tensor, grid: Any = grid, size: Any = size) -> Outputs:
            masks = image[0]
            for level in levels:
                masks = torch.bmm(masks, level[0])
            masks = masks.transpose(1, 2).unflatten(2, grid)
            return {"labels": F.interpolate(masks, size, mode="bilinear", align_corners=False).argmax(1)}

        def with_max(image: Tensor, *levels: Tensor, grid: Any = grid, size: Any = size) -> Outputs:
            masks = image[0].mT
            for level in levels:
                masks = torch.bmm(level[0].mT, masks)
            masks = masks.unflatten(2, grid)
            return {"labels": F.interpolate(masks, size, mode="bilinear", align_corners=False).max(1).indices}

        def ours(image: Tensor, *levels: Tensor, grid: Any = grid, size: Any = size, extras: bool = False) -> Outputs:
            result = propagate_labels(image, levels, grid, size, confidence=extras, statistics=extras)
            return {"labels": (result if isinstance(result, Tensor) else result.labels)[0]}

        def judge(image: Tensor, *levels: Tensor, grid: Any = grid, size: Any = size) -> Judge:
            video = reduce(torch.matmul, [level.double() for level in levels])
            labels, clear = exact_labels(image, video, grid, size)

            def check(outputs: Outputs) -> dict[str, float]:
                pixels = int((outputs["labels"].to(torch.uint8) != labels)[clear].sum())
                if pixels:
                    raise WrongResult(f"{pixels} pixels have another label than in float64")
                return {"labels": 0.0}

            return check

        counted = (1, frames, grid[0] * grid[1], slots, above, size[0] * size[1])
        yield Case(
            shape={"T": frames, "grid": grid, "N": slots, "K": objects, "size": size, "attention": kind},
            dtype=torch.float32,
            inputs=inputs,
            variants={
                "argmax": chain,
                "max": with_max,
                "argmax compiled": torch.compile(chain),
                OURS: ours,
                f"{OURS} extras": lambda *maps, ours=ours: ours(*maps, extras=True),
            },
            judge=judge,
            bytes=bytes_moved(*counted),
            flops=flops(*counted),
        )


def attention_cases(device: str) -> Iterator[Case]:
    """One YTVIS-19 video; on a GPU a batch of 16."""
    batch = 16 if device == "cuda" else 1
    frames, (h, w), slots, objects, _ = VIDEO
    tokens = h * w

    def inputs() -> tuple[Tensor, ...]:
        image = torch.randn(batch, frames, tokens, slots, device=device).softmax(-1)
        grad = torch.randn(batch, frames, tokens, objects, device=device)
        return image, torch.randn(batch, frames, slots, objects, device=device).softmax(-1), grad

    def step(function: Any) -> Any:
        def run(image: Tensor, video: Tensor, grad: Tensor) -> Outputs:
            leaves = [t.detach().requires_grad_() for t in (image, video)]
            masks = function(*leaves)
            grads = torch.autograd.grad(masks, leaves, grad)
            return {"masks": masks.detach(), "gradient of image": grads[0], "gradient of video": grads[1]}

        return run

    product = 2 * batch * frames * tokens * slots * objects
    # Forward reads both maps and writes a third; backward reads all three and writes gradients of the first two.
    sizes = [batch * frames * n for n in (tokens * slots, slots * objects, tokens * objects)]
    yield Case(
        shape={"B": batch, "T": frames, "M": tokens, "N": slots, "K": objects},
        dtype=torch.float32,
        inputs=inputs,
        variants={
            "matmul": step(torch.matmul),
            "matmul compiled": step(torch.compile(torch.matmul)),
            OURS: step(propagate_attention),
        },
        judge=close_to(step(torch.matmul), 1e-5),
        bytes=4 * (3 * sizes[0] + 3 * sizes[1] + 2 * sizes[2]),
        flops=3 * product,
    )


PROPAGATE_LABELS = Benchmark(
    "propagate_labels",
    "label maps of a video at full resolution from its attention maps",
    {
        "argmax": "`torch.bmm`, `F.interpolate` and `argmax`",
        "max": "the same with the objects first and `max`, which is faster on some sizes",
        "argmax compiled": "`argmax` under `torch.compile`",
        f"{OURS} extras": "the op with confidence, areas and boxes",
    },
    label_cases,
)
PROPAGATE_ATTENTION = Benchmark(
    "propagate_attention",
    "the product of the two attention maps, forward and backward to both. It is one matrix product, so a kernel "
    "can gain nothing",
    {"matmul": "`torch.matmul` and autograd", "matmul compiled": "the same under `torch.compile`"},
    attention_cases,
)
