"""Label maps of videos: ``propagate_labels`` against product, interpolation and argmax in PyTorch.

    python -m profiling.propagation --threads 2 --out profiling/results/propagation-cpu.json
    python -m profiling.propagation --device cuda --out profiling/results/propagation-cuda.json

Attention of two kinds: "objects" moves smooth blobs over the grid, as in a segmentation; in "noise" each patch is on
its own, the worst case. Labels are compared with float64 before anything is timed. All variants take turns.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import propagate_labels
from slotkernels.propagation import bytes_moved, flops
from torch import Tensor

from profiling.timing import Run, captured, interleaved, machine, peak_bytes, save

SHAPES = (  # frames, patch grid, image slots, video slots, pixels: YTVIS-19, MOVi-E, HD
    (36, (24, 36), 32, 8, (336, 504)),
    (24, (24, 24), 32, 20, (336, 336)),
    (36, (24, 36), 32, 8, (720, 1280)),
)
STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def noise(frames: int, grid: tuple[int, int], slots: int, objects: int) -> tuple[Tensor, Tensor]:
    """Attention in which neighbouring patches have nothing in common."""
    image = torch.randn(1, frames, grid[0] * grid[1], slots)
    return (2 * image).softmax(-1), (2 * torch.randn(1, frames, slots, objects)).softmax(-1)


def blobs(frames: int, grid: tuple[int, int], slots: int, objects: int) -> tuple[Tensor, Tensor]:
    """Each slot is a blob that moves, and belongs to one object for the most part."""
    h, w = grid
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float().unsqueeze(1)  # [M, 1, 2]
    time = torch.arange(frames).view(frames, 1, 1, 1) / 36
    start, speed = torch.rand(slots, 2), 0.3 * torch.randn(slots, 2)
    centres = (start + speed * time) % 1 * torch.tensor([h, w])  # [T, 1, N, 2]
    image = (-(places - centres).square().sum(-1) / 6).softmax(-1)
    video = (6 * torch.randn(1, slots, objects) + torch.randn(frames, slots, objects)).softmax(-1)
    return image.unsqueeze(0), video.unsqueeze(0)


def chain(image: Tensor, video: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """What the op replaces."""
    masks = torch.bmm(image[0], video[0]).transpose(1, 2).unflatten(2, grid)
    return F.interpolate(masks, size, mode="bilinear", align_corners=False).argmax(1)


def chain_with_max(image: Tensor, video: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The same with the objects first, and with ``max`` instead of ``argmax``."""
    masks = torch.bmm(video[0].mT, image[0].mT).unflatten(2, grid)
    return F.interpolate(masks, size, mode="bilinear", align_corners=False).max(1).indices


def wrong(labels: Tensor, image: Tensor, video: Tensor, grid: tuple[int, int]) -> int:
    """Pixels with another label than in float64 though the two best scores differ by more than rounding."""
    count = 0
    for frame, found in enumerate(labels):
        masks = (image[0, frame].double() @ video[0, frame].double()).T.unflatten(1, grid).unsqueeze(0)
        best = F.interpolate(masks, found.shape, mode="bilinear", align_corners=False)[0].topk(2, 0)
        clear = best.values[0] - best.values[1] > (image.shape[3] + 2 * sum(grid) + 16) * 1.2e-7
        count += int((found.long() != best.indices[0])[clear].sum())
    return count


def resident_bytes(run: Run) -> int:
    """Growth of the process at the peak of one call: what a profiler of tensors does not see counts too."""

    def read(name: str) -> int:
        return 1024 * int(STATUS.read_text().split(f"{name}:")[1].split()[0])

    run()
    before = read("VmRSS")
    REFS.write_text("5")  # resets the peak
    run()
    return read("VmHWM") - before


def benchmark(shape: tuple[Any, ...], kind: str, device: str, seconds: float) -> dict[str, Any]:
    """Times and memory of all variants at one shape."""
    frames, grid, slots, objects, size = shape
    image, video = (t.to(device) for t in {"noise": noise, "objects": blobs}[kind](frames, grid, slots, objects))
    half = image.half()
    fast = "triton" if device == "cuda" else "cpp"

    def ours(backend: str = fast, attention: Tensor = image, **extras: bool) -> Run:
        return lambda: propagate_labels(attention, video, grid, size, backend=backend, **extras)

    runs: dict[str, Run] = {
        "chain": lambda: chain(image, video, grid, size),
        "chain with max": lambda: chain_with_max(image, video, grid, size),
        "reference": ours("reference"),
        fast: ours(),
        f"{fast}, fp16 attention": ours(attention=half),
        f"{fast}, confidence": ours(confidence=True),
        f"{fast}, areas and boxes": ours(statistics=True),
    }
    if device == "cuda":
        runs[f"{fast}, captured"] = captured(runs[fast])
    labels = propagate_labels(image, video, grid, size, backend=fast)[0]
    assert wrong(labels, image, video, grid) == 0, "labels differ: speed is not reported"
    times = interleaved(runs, device, seconds)
    baseline = {key: min(times[name][key] for name in ("chain", "chain with max")) for key in ("median", "least")}
    peaks = {name: peak_bytes(run, device) / 2**20 for name, run in runs.items()}
    sizes = (1, frames, grid[0] * grid[1], slots, objects, size[0] * size[1])
    row: dict[str, Any] = {
        "shape": {"T": frames, "grid": grid, "N": slots, "K": objects, "size": size, "attention": kind},
        "milliseconds": times,
        "peak MiB of tensors": peaks,
        "faster than the better chain": {key: baseline[key] / times[fast][key] for key in baseline},
        "gbytes per second": bytes_moved(*sizes) / times[fast]["least"] / 1e6,
        "gflops": flops(*sizes) / times[fast]["least"] / 1e6,
    }
    if device == "cpu" and REFS.exists():
        row["peak MiB of the process"] = {name: resident_bytes(runs[name]) / 2**20 for name in ("chain", fast)}
    return row


def main() -> None:
    """Run all shapes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20, help="per shape")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        for kind in ("objects", "noise"):
            row = benchmark(shape, kind, args.device, args.seconds)
            rows.append(row)
            print(row["shape"], {name: round(time["least"], 2) for name, time in row["milliseconds"].items()})
            print({key: round(value, 1) for key, value in row["faster than the better chain"].items()})
    save(args.out, {**machine(args.device), "load average": os.getloadavg(), "rows": rows})


if __name__ == "__main__":
    main()
