"""Compare a model before and after slotkernels replaces a part of it: changed lines, losses, and times of a step.

    python examples/dropin/compare.py savi

Both models start from the same weights and get the same batches, so their losses are equal up to rounding. They are
trained in float64 for this comparison: in float32 some gradients that should be 0 are small rounding errors, which Adam
scales up, and the two models drift apart. Times are measured in float32. A ratio above 1 means that the model is faster
after the change.
"""

import argparse
import difflib
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from slotkernels import SlotAttention
from torch import Tensor, nn

HERE = Path(__file__).parent


def videos() -> Tensor:
    """[4, 6, 3, 32, 32]: three coloured discs that move in straight lines, on grey."""
    grid, frames = torch.linspace(-1, 1, 32), torch.full((4, 6, 3, 32, 32), 0.2)
    for _ in range(3):
        start, speed, colour = torch.rand(4, 2, 1) * 1.6 - 0.8, torch.randn(4, 2, 1) * 0.1, torch.rand(4, 1, 3, 1, 1)
        y, x = (start + speed * torch.arange(6)).unbind(1)  # [4, 6] each
        inside = (grid[:, None] - y[..., None, None]) ** 2 + (grid - x[..., None, None]) ** 2 < 0.1
        frames = torch.where(inside[:, :, None], colour, frames)
    return frames


def images() -> Tensor:
    """[24, 3, 32, 32]: the frames of such videos."""
    return videos().flatten(0, 1)


def features() -> Tensor:
    """[4, 6, 256, 128]: random projections of 2 x 2 patches of such videos, on a grid of 16 x 16."""
    patches = videos().unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 1, 3, 4, 2, 5, 6).flatten(4).flatten(2, 3)
    return patches @ torch.randn(12, 128, generator=torch.Generator().manual_seed(0))


def clouds() -> Tensor:
    """[32, 128, 3]: points on ellipsoids."""
    return nn.functional.normalize(torch.randn(32, 128, 3), dim=-1) * torch.rand(32, 1, 3)


class Pair(NamedTuple):
    """What distinguishes one comparison from another."""

    data: Callable[[], Tensor]
    style: str | None = None  # of the published parameters of slot attention
    needs: str | None = None  # module that the model before the change imports
    install: str | None = None


PAIRS = {
    "lucidrains": Pair(images, "lucidrains", "slot_attention", "slot-attention==1.5.2"),
    "savi": Pair(videos, "savi"),
    "slot_contrast": Pair(features, "videosaur"),
    "samples_loss": Pair(clouds, None, "geomloss", "geomloss==0.3.1"),
}


def model(name: str, side: str) -> nn.Module:
    """The model of ``NAME/before.py`` or ``NAME/after.py``, with random weights."""
    spec = importlib.util.spec_from_file_location(f"{name}_{side}", HERE / name / f"{side}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model()


def copy_weights(before: nn.Module, after: nn.Module, style: str | None) -> None:
    """Give the second model the weights of the first; those of slot attention have other names."""
    weights = before.state_dict()
    if style:
        part = "slot_attention."
        published = {key.removeprefix(part): weights.pop(key) for key in list(weights) if key.startswith(part)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*another module makes the initial slots")
            loaded = SlotAttention.load_published(published, style=style).state_dict()
        own = after.slot_attention.state_dict()
        weights |= {part + key: loaded[key] for key in own}
    after.load_state_dict(weights)
    if style == "savi":
        # SAVi's GRU has one bias for each of the gates r and z; torch.nn.GRUCell has the sum of two, which would learn
        # twice as fast. The second is loaded as 0 and stays 0.
        bias = after.slot_attention.gru.bias_hh
        learns = torch.arange(len(bias)) >= len(bias) * 2 // 3
        bias.register_hook(lambda gradient: gradient * learns)


def changes(name: str) -> list[str]:
    """The lines of code that differ, as a diff without context."""
    texts = [(HERE / name / f"{side}.py").read_text().split('"""', 2)[2].splitlines() for side in ("before", "after")]
    return [line for line in difflib.unified_diff(*texts, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")]


class Trainer:
    """Both models of a pair, with the same weights in the default dtype."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.pair, self.models = PAIRS[name], [model(name, "before"), model(name, "after")]
        copy_weights(*self.models, self.pair.style)
        self.optimisers = [torch.optim.Adam(each.parameters(), lr=1e-3) for each in self.models]

    def step(self, side: int, number: int) -> tuple[float, float]:
        """Loss and seconds of a step of one model."""
        torch.manual_seed(number)  # of the batch and of initial slots
        batch = self.pair.data()
        begin = time.perf_counter()
        self.optimisers[side].zero_grad()
        loss = self.models[side](batch)
        loss.backward()
        self.optimisers[side].step()
        return loss.item(), time.perf_counter() - begin


def compare(name: str, steps: int, seconds: float) -> dict[str, object]:
    """Train both for ``steps`` steps in float64, then time alternating steps in float32 for ``seconds``."""
    single = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    trainer = Trainer(name)
    losses = [[trainer.step(side, number)[0] for side in (0, 1)] for number in range(steps)]
    torch.set_default_dtype(single)
    trainer, times = Trainer(name), [[], []]
    first = [trainer.step(side, 0)[0] for side in (0, 1)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 5:
        for side in (0, 1):
            times[side].append(trainer.step(side, 1 + len(times[side]))[1])
    quartiles = statistics.quantiles([before / after for before, after in zip(*times, strict=True)], n=4)
    return {
        "changes": changes(name),
        "losses": losses,
        "largest relative difference": max(abs(after / before - 1) for before, after in losses),
        "of the first loss in float32": abs(first[1] / first[0] - 1),
        "milliseconds": [1e3 * statistics.median(each) for each in times],
        "ratio": dict(zip(("lower quartile", "median", "upper quartile"), quartiles, strict=True)),
        "rounds": len(times[0]),
    }


def show(name: str, result: dict) -> None:
    """Print a result."""
    print(f"{name}: what changes", *result["changes"], sep="\n    ")
    for number, (before, after) in enumerate(result["losses"]):
        print(f"    step {number}: loss {before:.6f} before, {after:.6f} after")
    print(f"    largest relative difference of the losses: {result['largest relative difference']:.1e} in float64")
    print(f"    relative difference of the first loss: {result['of the first loss in float32']:.1e} in float32")
    before, after = result["milliseconds"]
    low, median, high = result["ratio"].values()
    print(f"    a step takes {before:.1f} ms before and {after:.1f} ms after the change")
    print(f"    ratio of the times: {median:.2f} (quartiles {low:.2f} and {high:.2f})")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=f"of {', '.join(PAIRS)}; all if none is named")
    parser.add_argument("--steps", type=int, default=5, help="of training whose losses are compared (default 5)")
    parser.add_argument("--seconds", type=float, default=8, help="of timing for each pair (default 8)")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    names = options.pairs or list(PAIRS)
    for name in names:
        if name not in PAIRS:
            parser.error(f"no pair {name!r}, expected {', '.join(PAIRS)}")
        needs, install = PAIRS[name].needs, PAIRS[name].install
        if needs and not importlib.util.find_spec(needs):
            sys.exit(f"error: {name} needs the package that it replaces: pip install {install}")
    results = {}
    for name in names:
        results[name] = compare(name, options.steps, options.seconds)
        show(name, results[name])
    if options.json:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
