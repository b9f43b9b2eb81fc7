"""The parts of a training step of SOLV: operations, bytes and launches, and the predicted time of each.

Operations and bytes come from the sizes, as in ``formulas.py``. Launches are counted by running the parts of the
model, with their backward passes. The time of a part is that of its operations, its bytes or the starts of its
kernels, whichever is longest.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from slotkernels import invariant_slot_attention as invariant
from slotkernels import merging, mixing
from torch import Tensor
from torch._subclasses import FakeTensorMode

from interpreter.engine.memory import count_parameters
from interpreter.engine.task import Task
from interpreter.methods.solv import SOLV
from interpreter.methods.solv.config import PRESETS, SolvTraining
from interpreter.methods.solv.model import Merged, Solv
from profiling.accounting.counts import Counts, HostWaits, branches_of_a_gpu, count, without_data
from profiling.accounting.formulas import ADAMW, Part, backbone, between
from profiling.common.setups import FEATURES, FRAMES_AT_ONCE, RandomInputs, random_backbone
from profiling.cost import DEVICES, seconds
from profiling.cost import Options as CostOptions

KEPT, CENTRES = "backbone, kept tokens of all frames", "backbone, all tokens of the centres"
INPUT, BINDING, TEMPORAL = "input map", "spatial binding", "temporal binding"
MERGING, DECODER, REST = "merging, frames of the slots", "decoder and loss", "optimiser and the rest"
BACKBONE = (KEPT, CENTRES)
# What profiling.bench measures of it.
BENCHMARKS = {
    "solv_binding": [INPUT, BINDING, TEMPORAL, MERGING],
    "solv_step": [INPUT, BINDING, TEMPORAL, MERGING, DECODER],
}
PARTS = (*BACKBONE, INPUT, BINDING, TEMPORAL, MERGING, DECODER, REST)


class Sizes(NamedTuple):
    """Of a step."""

    batch: int  # B windows
    frames: int  # F of a window
    tokens: int  # M of a frame
    kept: int  # M' that are not dropped
    slots: int  # N
    features: int  # C
    dim: int  # D
    hidden: int  # H of the decoder

    @staticmethod
    def of(config: SolvTraining) -> "Sizes":
        """Of a preset."""
        features, patch = FEATURES[config.backbone.backbone]
        tokens = (config.data.frame_size[0] // patch) * (config.data.frame_size[1] // patch)
        model, kept = config.model, int(tokens * (1 - config.token_drop))
        widths = (features, model.dim, model.decoder_dim)
        return Sizes(config.optim.batch_size, 2 * config.half_window + 1, tokens, kept, model.num_slots, *widths)


def parts(config: SolvTraining, parameters: int) -> list[Part]:
    """A training step that drops tokens before the backbone's blocks; several parts may have one name."""
    s = Sizes.of(config)
    encoded = [*backbone(config, s.batch * s.frames, s.kept, KEPT), *backbone(config, s.batch, None, CENTRES)]
    return [
        *(Part(KEPT if part.name.startswith(KEPT) else CENTRES, part.flops, part.bytes) for part in encoded),
        *_input_map(s),
        *_binding(s, config.model.iterations, config.model.learn_grid),
        *_temporal(s, config.model.temporal_layers),
        *_merging(s),
        *_decoder(s, config.model.decoder_layers),
        Part(REST, 0, ADAMW * parameters),
    ]


def _input_map(s: Sizes) -> list[Part]:
    """LayerNorm, Linear, ReLU, Linear; the features need no gradient, but the norm's weights do."""
    rows = s.batch * s.frames * s.kept
    norm, relu = (4 + 2) + (2 + 4), (2 + 2) + (2 + 2 + 2)  # forward and backward, bytes of an element
    return [Part(INPUT, 3 * 2 * rows * s.features * (s.features + s.dim), rows * s.features * (norm + relu))]


def _binding(s: Sizes, iterations: int, learned_grid: bool) -> list[Part]:
    """Keys and values, pairs of slots and tokens in float32, products of the slots alone; one attention at the end."""
    images = s.batch * s.frames
    rows, sizes = images * s.slots, (images, s.slots, s.kept, s.dim)
    norm = images * s.kept * s.dim * ((2 + 2) + (2 + 2 + 2))
    moved = sum(invariant.bytes_moved(*sizes, itemsize=2, backward=b) for b in (False, True))
    pairs = invariant.flops(*sizes) + invariant.flops(*sizes, backward=True, learned_grid=learned_grid)
    # q and f's second layer on it, in each attention; that layer on updates, GRU and MLP, in each iteration; to_slots.
    width = s.dim**2 * ((iterations + 1) * 2 + iterations * (1 + 6 + 8) + 1)
    weights = s.dim * s.dim * (2 * s.dim + 2)  # f's first layer times those of keys, values and places
    return [
        Part(BINDING, 3 * (4 * images * s.kept * s.dim**2 + 2 * rows * width + 2 * weights), norm),
        Part(BINDING, (iterations + 1) * pairs, (iterations + 1) * moved, single=True),
    ]


def _temporal(s: Sizes, layers: int) -> list[Part]:
    """Layers over the frames of each slot; the last one updates the centre alone."""
    queries = [s.frames] * (layers - 1) + [1] * bool(layers)
    width = sum(2 * (3 * s.frames + 9 * q) * s.dim**2 + 4 * q * s.frames * s.dim for q in queries)
    moved = between(2) * s.dim * sum(queries)
    return [Part(TEMPORAL, 3 * s.batch * s.slots * width, s.batch * s.slots * moved)]


def _merging(s: Sizes) -> list[Part]:
    """Clusters of a sample's slots, their sums, and their places; arithmetic in float32."""
    sizes = (s.batch, s.slots, s.kept, s.dim)
    places = 2 * 4 * s.batch * s.slots * s.kept * 2 * (2 + 2)  # two sums of weights times coordinates, both ways
    return [Part(MERGING, merging.flops(*sizes), 3 * merging.bytes_moved(*sizes) + places, single=True)]


def _decoder(s: Sizes, layers: int) -> list[Part]:
    """All slots at all patches: the static shape of a step, merged or not."""
    pairs = s.batch * s.slots * s.tokens
    last = s.batch * s.tokens * s.features
    # The first layer on slots, positions and frames, then on pairs, as a product with three rows that is made again in
    # the backward pass; hidden layers; the last one on the mixture.
    first = 3 * 2 * s.hidden * s.dim * (s.batch * s.slots + s.tokens + 2) + 4 * 2 * pairs * 3 * s.hidden
    flops = first + 3 * 2 * (layers - 1) * pairs * s.hidden**2 + 3 * 2 * last * s.hidden
    # A layer's ReLU forward and backward, and the gradient of its bias; the first layer twice, and three passes of its
    # gradient; loss: float32, with its gradient.
    elements = layers * (4 + 6) + (layers - 1) * 2 + (2 + 6) + 3 * 2
    mix = (s.batch, s.slots, s.tokens, s.hidden)
    moved = sum(mixing.bytes_moved(*mix, 2, backward=backward) for backward in (False, True))
    operations = sum(mixing.flops(*mix, backward=backward) for backward in (False, True))
    return [
        Part(DECODER, flops, pairs * s.hidden * elements),
        Part(DECODER, operations, moved, single=True),
        Part(DECODER, 0, last * (2 + 4 + 2)),
    ]


class Piece(NamedTuple):
    """A part of the model, to be counted."""

    run: Callable[..., Iterable[Tensor]]
    inputs: tuple[Tensor, ...]

    def both_ways(self) -> None:
        """Forward, and backward to those inputs and parameters that need a gradient."""
        results = [result for result in self.run(*self.inputs) if result.requires_grad]
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def pieces(model: Solv, config: SolvTraining) -> dict[str, Piece]:
    """The parts of the model with inputs of their sizes."""
    s = Sizes.of(config)
    images = s.batch * s.frames

    def learned(*shape: int) -> Tensor:
        return torch.empty(shape).requires_grad_()

    def input_map(features: Tensor) -> tuple[Tensor]:
        return (model.to_tokens(features),)

    def binding(tokens: Tensor, places: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        found = model.slot_attention(tokens, places, mlp_mask=mask)
        return model.to_slots(found.slots), found.attention

    def temporal(slots: Tensor, present: Tensor) -> tuple[Tensor]:
        return (model.temporal(slots, present),)

    def merging_of(slots: Tensor, attention: Tensor, places: Tensor, merges: Tensor) -> tuple[Tensor, ...]:
        labels = torch.where(merges[:, None], model.labels(slots), torch.arange(s.slots))
        return tuple(model.merged(slots, attention, places, labels))

    def decoding(slots: Tensor, positions: Tensor, scales: Tensor, valid: Tensor, target: Tensor) -> tuple[Tensor]:
        decoded = model.decode(Merged(slots, valid, positions, scales))
        return (F.mse_loss(decoded.features, target),)

    of_slots, places = (s.batch, s.slots), torch.empty(images, s.kept, 2)
    mask = torch.empty(images, config.model.iterations, s.slots, s.dim)
    merges, valid = torch.empty(s.batch, dtype=torch.bool), torch.empty(of_slots, dtype=torch.bool)
    attention, frames = learned(s.batch, s.kept, s.slots), (learned(*of_slots, 2), learned(*of_slots, 2))
    present, target = torch.empty(s.batch, s.frames, dtype=torch.bool), torch.empty(s.batch, s.tokens, s.features)
    return {
        INPUT: Piece(input_map, (torch.empty(images, s.kept, s.features),)),
        BINDING: Piece(binding, (learned(images, s.kept, s.dim), places, mask)),
        TEMPORAL: Piece(temporal, (learned(s.batch, s.frames, s.slots, s.dim), present)),
        MERGING: Piece(merging_of, (learned(*of_slots, s.dim), attention, places[: s.batch], merges)),
        DECODER: Piece(decoding, (learned(*of_slots, s.dim), *frames, valid, target)),
    }


class _Windows(RandomInputs):
    """Inputs of a step, as ``interpreter.methods.windows`` makes them."""

    def dtypes(self) -> list[torch.dtype]:
        """See :meth:`Inputs.dtypes`."""
        return [torch.float32, torch.float32, torch.int64, torch.bool, torch.bool]


def model_of(config: SolvTraining) -> Solv:
    """The model at the sizes of a preset, with random weights."""
    s, (height, width), patch = Sizes.of(config), config.data.frame_size, FEATURES[config.backbone.backbone][1]
    return Solv(config.model, s.features, (height // patch, width // patch), s.frames)


def task_of(config: SolvTraining, model: Solv) -> Task:
    """A step at the sizes of a preset."""
    s, device = Sizes.of(config), torch.device("cpu")
    shapes = ((s.frames, s.kept, s.features), (s.tokens, s.features), (s.frames, s.kept), (s.frames,), ())
    inputs = _Windows(s.batch, shapes, s.frames, device)
    stage, optim = SOLV.stage("model"), replace(config.optim, precision="fp32")
    return Task(model, stage.loss, inputs, stage.noise(model), optim, device)


def launches(model: Solv, config: SolvTraining, whole: int) -> dict[str, int]:
    """Operators and launches of each part; those of a ``whole`` step that are in no other part are the last one's."""
    s = Sizes.of(config)
    vit, found = random_backbone(config.backbone, torch.device("cpu")), {}
    with branches_of_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        model = without_data(model)
        for name, piece in pieces(model, config).items():
            found[name] = _launches(piece.both_ways)
        found[REST] = whole - sum(found.values())
        vit = without_data(vit)
        frames = torch.empty(FRAMES_AT_ONCE, *config.data.frame_size, 3, dtype=torch.uint8)
        keep = torch.empty(FRAMES_AT_ONCE, s.kept, dtype=torch.int64)
        for name, kept, images in ((KEPT, keep, s.batch * s.frames), (CENTRES, None, s.batch)):
            found[name] = -(-images // FRAMES_AT_ONCE) * _launches(partial(vit.features, frames, kept))
    return found


def _launches(run: Callable[[], object]) -> int:
    waits = HostWaits()
    with waits, Counts(waits) as counts:
        run()
    return counts.operators.total() + counts.launches.total()


def predicted() -> dict[str, Any]:
    """What each part of a step of the preset ytvis19 costs on an H100, predicted as in ``profiling.cost``.

    For an H200 the parts that ``profiling.bench`` has measured there are predicted too.
    """
    config, options = PRESETS["ytvis19"], CostOptions()
    model = model_of(config)
    whole, of_parts = count(task_of(config, model)), parts(config, count_parameters(model))
    counted = launches(model, config, whole["operators"] + sum(whole["own launches"].values()))

    def milliseconds(name: str, gpu: str) -> float:
        busy = sum(seconds(part, DEVICES[gpu], options) for part in of_parts if part.name == name)
        return round(1e3 * max(busy, counted[name] * options.kernel_us * 1e-6), 3)

    rows: dict[str, dict[str, float]] = {}
    for name in PARTS:
        some = [part for part in of_parts if part.name == name]
        rows[name] = {
            "flops": sum(part.flops for part in some),
            "bytes": sum(part.bytes for part in some),
            "launches": counted[name],
            "milliseconds": milliseconds(name, "h100"),
        }
    total = sum(row["milliseconds"] for row in rows.values())
    cached = total - sum(rows[name]["milliseconds"] for name in BACKBONE)
    for name, row in rows.items():
        row["share"] = round(row["milliseconds"] / total, 4)
        row["share on cached features"] = 0.0 if name in BACKBONE else round(row["milliseconds"] / cached, 4)
    return {
        "preset": "ytvis19",
        "sizes": Sizes.of(config)._asdict(),
        "device": DEVICES["h100"].name,
        "assumed": {name: getattr(options, name) for name in ("mfu", "bandwidth_use", "kernel_us")},
        "host waits": whole["host waits"],
        "milliseconds": round(total, 2),
        "milliseconds on cached features": round(cached, 2),
        "parts": rows,
        "h200": {name: round(sum(milliseconds(part, "h200") for part in of), 2) for name, of in BENCHMARKS.items()},
    }
