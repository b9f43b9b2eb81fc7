"""Label maps through a fast guided filter, compared with the same filter in PyTorch."""

from collections.abc import Iterator
from typing import Any

import torch
from slotkernels import guided_labels, propagate_labels
from slotkernels.guided_labels import bytes_moved, flops
from slotkernels.guided_labels.op import default_radius, low_size
from slotkernels.guided_labels.reference import filtered
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Judge, Outputs, WrongResult
from profiling.bench.propagation import blobs, exact_labels

# Frames, patch grid, image slots, video slots, pixels: YTVIS-19 and DAVIS.
SHAPES: tuple[Any, ...] = ((36, (24, 36), 32, 8, (336, 504)), (8, (24, 36), 16, 8, (480, 854)))
SUBSAMPLE, EPSILON = 4, 1e-4  # the op's defaults
CLEAR = 1e-4  # if the two best scores differ by more, float32 and float64 have them in the same order


def scenes(frames: int, size: tuple[int, int]) -> Tensor:
    """Frames [1, T, H, W, 3] of coloured tiles with noise."""
    tiles = torch.randint(0, 200, (frames, 3, -(-size[0] // 32), -(-size[1] // 32)))
    colours = tiles.repeat_interleave(32, 2).repeat_interleave(32, 3)[:, :, : size[0], : size[1]]
    noisy = colours + torch.randint(0, 56, (frames, 1, *size))
    return noisy.to(torch.uint8).permute(0, 2, 3, 1).contiguous().unsqueeze(0)


def soft_masks(image: Tensor, video: Tensor, guide: Tensor, grid: tuple[int, int]) -> Tensor:
    """Filtered masks [T, K, H, W] in PyTorch's operations, in the dtype of the attention."""
    scores = torch.bmm(video[0].mT, image[0].mT).unflatten(2, grid)
    size = (guide.shape[2], guide.shape[3])
    colours = guide[0].permute(0, 3, 1, 2).to(scores.dtype) / 255
    return filtered(scores, colours - 0.5, round(default_radius(grid, size) / SUBSAMPLE), EPSILON, SUBSAMPLE)


def cases(device: str) -> Iterator[Case]:
    """Sizes of YTVIS-19 and DAVIS; attention as in a segmentation."""
    for frames, grid, slots, objects, size in SHAPES:

        def inputs(sizes: Any = (frames, grid, slots, objects), size: Any = size) -> tuple[Tensor, ...]:
            return tuple(t.to(device) for t in (*blobs(*sizes), scenes(sizes[0], size)))

        def unfused(image: Tensor, video: Tensor, guide: Tensor, grid: Any = grid) -> Outputs:
            return {"labels": soft_masks(image, video, guide, grid).max(1).indices}

        def ours(image: Tensor, video: Tensor, guide: Tensor, grid: Any = grid, extras: bool = False) -> Outputs:
            result = guided_labels(image, video, grid, guide, confidence=extras, statistics=extras)
            return {"labels": (result if isinstance(result, Tensor) else result.labels)[0]}

        def unfiltered(image: Tensor, video: Tensor, guide: Tensor, grid: Any = grid) -> Outputs:
            return {"unfiltered labels": propagate_labels(image, video, grid, (guide.shape[2], guide.shape[3]))[0]}

        def judge(image: Tensor, video: Tensor, guide: Tensor, grid: Any = grid) -> Judge:
            truth = {"unfiltered labels": exact_labels(image, video, grid, (guide.shape[2], guide.shape[3]))}
            labels, clear = [], []
            for t in range(guide.shape[1]):
                part = slice(t, t + 1)
                masks = soft_masks(image[:, part].double(), video[:, part].double(), guide[:, part], grid)
                best = masks.topk(2, 1)
                labels.append(best.indices[:, 0].to(torch.uint8))
                clear.append(best.values[:, 0] - best.values[:, 1] > CLEAR)
            truth["labels"] = torch.cat(labels), torch.cat(clear)

            def check(outputs: Outputs) -> dict[str, float]:
                for name, value in outputs.items():
                    expected, certain = truth[name]
                    pixels = int((value.to(torch.uint8) != expected)[certain].sum())
                    if pixels:
                        raise WrongResult(f"{name}: {pixels} pixels have another label than in float64")
                return dict.fromkeys(outputs, 0.0)

            return check

        counted = (1, frames, grid[0] * grid[1], slots, objects, size[0] * size[1])
        low_height, low_width = low_size(size[0], size[1], SUBSAMPLE)
        yield Case(
            shape={"T": frames, "grid": grid, "N": slots, "K": objects, "size": size, "subsample": SUBSAMPLE},
            dtype=torch.float32,
            inputs=inputs,
            variants={
                "unfused": unfused,
                "unfused compiled": torch.compile(unfused),
                OURS: ours,
                f"{OURS} extras": lambda *tensors, ours=ours: ours(*tensors, extras=True),
                f"{OURS} unfiltered": unfiltered,
            },
            judge=judge,
            bytes=bytes_moved(*counted),
            flops=flops(*counted, low_height * low_width),
        )


GUIDED_LABELS = Benchmark(
    "guided_labels",
    "label maps of a video whose edges follow its frames: soft masks through a fast guided filter, and the argmax",
    {
        "unfused": "the same filter in PyTorch, all frames at once, and `max`",
        "unfused compiled": "the same under `torch.compile`",
        f"{OURS} extras": "the op with confidence, areas and boxes",
        f"{OURS} unfiltered": "`propagate_labels`, without a filter, so its labels differ",
    },
    cases,
)
