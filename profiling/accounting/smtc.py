"""The parts of a training step of SMTC: operations, bytes and launches, and the predicted time of each.

It works as ``solv.py``. Here the backbone is trained, and a part has the work of student and teacher unless its name
says otherwise.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from slotkernels import matching, slot_attention
from slotkernels.slot_attention.prepared import absorbs, saved_by_merging
from slotkernels.transport_targets import bytes_moved as transport_bytes
from slotkernels.transport_targets import flops as transport_flops
from torch import Tensor
from torch._subclasses import FakeTensorMode

from interpreter.engine.memory import count_parameters
from interpreter.engine.task import Task
from interpreter.methods.smtc import SmtcStage
from interpreter.methods.smtc.config import PRESETS, SmtcTraining
from interpreter.methods.smtc.model import Grouped, Smtc
from interpreter.models.backbones import trainable
from profiling.accounting.counts import Counts, HostWaits, branches_of_a_gpu, count, without_data
from profiling.accounting.formulas import ADAMW, VIT_LAYERS, Part, transformer
from profiling.common.setups import FEATURES, RandomInputs, random_backbone
from profiling.cost import DEVICES, seconds
from profiling.cost import Options as CostOptions

PRESET = "ytvos"
STUDENT, TEACHER = "backbone of the student, both ways", "backbone of the teacher"
CORRELATION, SLOTS, LOSSES = "correlation embedding", "slot attention, two stages", "heads and losses"
REST = "optimiser, teacher's weights and the rest"
PARTS = (STUDENT, TEACHER, CORRELATION, SLOTS, LOSSES, REST)
BACKBONE = (STUDENT, TEACHER)
FORWARD, BOTH_WAYS = 1, 3  # a product's work, without and with its two gradients
EMA = 4 * 3  # bytes per parameter of the teacher: both weights read, one written


class Sizes(NamedTuple):
    """Of a step."""

    batch: int  # B clips
    frames: int  # T of a clip
    tokens: int  # M of a frame
    semantics: int  # N
    instances: int  # P of a semantic
    features: int  # C
    dim: int  # D

    @staticmethod
    def of(config: SmtcTraining) -> "Sizes":
        """Of a preset."""
        features, patch = FEATURES[config.backbone.backbone]
        tokens = (config.data.frame_size[0] // patch) * (config.data.frame_size[1] // patch)
        model, batch = config.model, config.optim.batch_size
        dim = model.dim or features
        return Sizes(batch, config.num_frames, tokens, model.num_semantics, model.num_instances, features, dim)

    @property
    def images(self) -> int:
        """Frames of all clips."""
        return self.batch * self.frames


def parts(config: SmtcTraining, parameters: int) -> list[Part]:
    """A training step with a trained backbone; several parts may have one name.

    Args:
        config: whose sizes.
        parameters: of the student.
    """
    s = Sizes.of(config)
    return [
        *_encoder(STUDENT, s, FEATURES[config.backbone.backbone][1], train=True),
        *_encoder(TEACHER, s, FEATURES[config.backbone.backbone][1], train=False),
        *_correlation(s),
        *_slot_attention(s, config.model.iterations, train=True),
        *_slot_attention(s, config.model.iterations, train=False),
        *_attention(s, config.model.iterations),
        *_losses(s, config.loss.transport_iterations),
        Part(REST, 0, (ADAMW + EMA) * parameters),
    ]


def _encoder(name: str, s: Sizes, patch: int, train: bool) -> list[Part]:
    """A ViT whose last block is replaced by its keys; the pixels need no gradient."""
    embed = Part(name, s.images * 2 * s.tokens * s.features * 3 * patch**2 * (2 if train else 1))
    blocks = transformer(name, s.images, s.tokens + 1, s.features, VIT_LAYERS - 1, out_dim=s.features, train=train)
    return [embed, *(Part(name, part.flops, part.bytes) for part in blocks)]


def _correlation(s: Sizes) -> list[Part]:
    """Two products for each frame and branch, in the order that takes less; partners are gathered, and the embedding is
    added, in float32."""
    by_map, by_matrix = s.tokens * (s.features + s.dim), 2 * s.features * s.dim
    products = (FORWARD + BOTH_WAYS) * 2 * s.images * s.tokens * min(by_map, by_matrix)
    return [Part(CORRELATION, products, (2 + 1) * s.images * s.tokens * (s.features * (4 + 4) + s.dim * (4 + 2 + 4)))]


def _slot_attention(s: Sizes, iterations: int, train: bool) -> list[Part]:
    """The norm of the tokens, and the slots' own products: queries, MLP, and projections of keys and values if folded
    into them."""
    slots, passes = s.semantics * (1 + s.instances), iterations + (2 if train else 0)
    norm = Part(SLOTS, 0, s.images * s.tokens * s.dim * ((4 + 2) + (4 + 2 + 4 if train else 0)))
    if absorbs(s.tokens, slots, s.dim, s.dim, iterations, int(train)):
        free = s.images * slots * (iterations - 1) if train else 0  # slots without gradients, in a step with them
        saved = max(0, saved_by_merging(free, s.dim, (s.dim, s.dim)))
        return [norm, Part(SLOTS, passes * 2 * s.images * slots * 5 * s.dim**2 - 2 * saved)]
    projections = (BOTH_WAYS if train else FORWARD) * 2 * 2 * s.images * s.tokens * s.dim**2
    return [norm, Part(SLOTS, passes * 2 * s.images * slots * 3 * s.dim**2 + projections)]


def _attention(s: Sizes, iterations: int) -> list[Part]:
    """Iterations over the tokens of both branches, in which semantics and instances take turns; the student's last one
    is differentiated."""
    made = []
    for slots in (s.semantics, s.semantics * s.instances):
        sizes = (s.images, slots, s.tokens, s.dim)
        forward = Part(SLOTS, slot_attention.flops(*sizes), slot_attention.bytes_moved(*sizes, itemsize=2))
        moved = slot_attention.bytes_moved(*sizes, itemsize=2, backward="tokens")
        made += [forward.times(2 * iterations), Part(SLOTS, slot_attention.flops(*sizes, backward="tokens"), moved)]
    return made


def _losses(s: Sizes, iterations: int) -> list[Part]:
    """Heads, transport in both directions of each pair of frames, and the similarities and matches of instances."""
    slots, pairs = s.semantics * s.instances, s.frames * (s.frames - 1) // 2
    heads = (FORWARD + BOTH_WAYS) * 2 * s.images * slots * 2 * 2 * s.dim**2
    overlap = BOTH_WAYS * 2 * s.images * s.semantics**2 * s.tokens
    similarities = 2 * 2 * s.batch * s.semantics * (s.frames * s.instances) ** 2 * s.dim  # one side needs a gradient
    transport = (s.batch * pairs, s.tokens, s.tokens, s.features, s.semantics)
    matches = s.batch * s.frames**2 * s.semantics
    masks = s.images * s.tokens * s.semantics * 4 * (2 + 4)  # cross-entropy and overlap, both ways, in float32
    return [
        Part(LOSSES, heads + overlap + similarities, masks + 3 * s.images * slots * s.dim * (4 + 4)),
        Part(LOSSES, transport_flops(*transport, iterations), transport_bytes(*transport), True),
        Part(LOSSES, matching.flops(matches, s.instances), matching.bytes_moved(matches, s.instances), True),
    ]


class _Views(RandomInputs):
    """Inputs of a step, as ``interpreter.methods.views`` makes them."""

    def dtypes(self) -> list[torch.dtype]:
        """See :meth:`Inputs.dtypes`."""
        return [torch.uint8, torch.uint8, torch.int64]


def model_of(config: SmtcTraining) -> Smtc:
    """The model at the sizes of a preset, with random weights."""
    encoder = trainable(random_backbone(config.backbone, torch.device("cpu")))
    return Smtc(config, Sizes.of(config).features, encoder.grid(config.data.frame_size), encoder)


def task_of(config: SmtcTraining, model: Smtc) -> Task:
    """A step at the sizes of a preset."""
    s, device, stage = Sizes.of(config), torch.device("cpu"), SmtcStage()
    clip = (s.frames, *config.data.frame_size, 3)
    inputs = _Views(s.batch, (clip, clip, (s.frames,)), s.frames, device)
    return Task(
        model,
        stage.loss,
        inputs,
        stage.noise(model),
        config.optim,
        device,
        parameter_groups=stage.parameter_groups,
        after_step=stage.after_step,
    )


def pieces(model: Smtc, config: SmtcTraining) -> dict[str, Callable[[], object]]:
    """Parts of the model, to be counted; "groups" are the correlation embedding and slot attention."""
    s, branches = Sizes.of(config), (model.student, model.teacher)
    encoders = [branch.encoder for branch in branches]
    depth = torch.empty(s.images, encoders[0].num_blocks, 2) if encoders[0] and model.depth_size else None
    frames = torch.empty(s.images, *config.data.frame_size, 3, dtype=torch.uint8)
    partners, noise = torch.empty(s.batch, s.frames, dtype=torch.int64), torch.empty(s.batch, model.noise_size)

    def learned(*shape: int) -> Tensor:
        return torch.empty(shape).requires_grad_()

    def encode() -> Tensor:
        assert encoders[0] is not None
        return encoders[0].encode(frames, depth)

    def encode_teacher() -> None:
        assert encoders[1] is not None
        with torch.no_grad():
            encoders[1].encode(frames)

    def embed() -> Iterable[Tensor]:
        with torch.no_grad():
            model.teacher.correlation(*(torch.empty(s.images, s.tokens, s.features) for _ in range(2)))
        return [model.student.correlation(*(learned(s.images, s.tokens, s.features) for _ in range(2)))]

    def group() -> Iterable[Tensor]:
        found = []
        for branch in branches:
            features = torch.empty(s.batch, s.frames, s.tokens, s.features)
            features.requires_grad_(branch is model.student)
            draws = torch.empty(s.images, s.semantics, s.instances, s.dim)
            with torch.set_grad_enabled(branch is model.student):
                branch.encoder, encoder = None, branch.encoder
                found.append(model._group(branch, features, partners, draws, None)[0])
                branch.encoder = encoder
        return found[0][:3]

    def losses() -> Iterable[Tensor]:
        def found(branch: Any, view: Tensor, *_: object) -> tuple[Grouped, Tensor]:
            made: Callable[..., Tensor] = learned if branch is model.student else torch.empty
            rows, masks = (s.images, s.semantics), (s.images, s.tokens, s.semantics)
            grouped = (made(*rows, s.dim), made(*masks), made(*rows, s.instances, s.dim), made(*masks, s.instances))
            return Grouped(*grouped), torch.empty(s.batch, s.frames, s.tokens, s.features)

        views = torch.empty(s.batch, s.frames, *config.data.frame_size, 3, dtype=torch.uint8)
        with mock.patch.object(model, "_group", found):
            return [model(views, views, partners, noise)[0]]

    named = {STUDENT: lambda: [encode()], CORRELATION: embed, "groups": group, LOSSES: losses}
    return {TEACHER: encode_teacher, **{name: partial(_both_ways, run) for name, run in named.items()}}


def _both_ways(run: Callable[[], Iterable[Tensor]]) -> None:
    """Forward, and backward to all that needs a gradient."""
    results = [result for result in run() if result.requires_grad]
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def launches(model: Smtc, config: SmtcTraining, whole: int) -> dict[str, int]:
    """Operators and launches of each part; those of a ``whole`` step that are in no other part are the last one's."""
    found = {}
    with branches_of_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        for name, run in pieces(without_data(model), config).items():
            waits = HostWaits()
            with waits, Counts(waits) as counts:
                run()
            found[name] = counts.operators.total() + counts.launches.total()
    found[SLOTS] = found.pop("groups") - found[CORRELATION]
    return found | {REST: whole - sum(found.values())}


def predicted() -> dict[str, Any]:
    """What each part of a step of the preset ytvos costs on an H100, predicted as in ``profiling.cost``."""
    config, options = PRESETS[PRESET], CostOptions()
    model = model_of(config)
    whole, of_parts = count(task_of(config, model)), parts(config, count_parameters(model.student))
    counted = launches(model, config, whole["operators"] + sum(whole["own launches"].values()))
    rows: dict[str, dict[str, float]] = {}
    for name in PARTS:
        some = [part for part in of_parts if part.name == name]
        busy = sum(seconds(part, DEVICES["h100"], options) for part in some)
        rows[name] = {
            "flops": sum(part.flops for part in some),
            "bytes": sum(part.bytes for part in some),
            "launches": counted[name],
            "milliseconds": round(1e3 * max(busy, counted[name] * options.kernel_us * 1e-6), 3),
        }
    total = sum(row["milliseconds"] for row in rows.values())
    without = total - sum(rows[name]["milliseconds"] for name in BACKBONE)
    for name, row in rows.items():
        row["share"] = round(row["milliseconds"] / total, 4)
        row["share from features on"] = 0.0 if name in BACKBONE else round(row["milliseconds"] / without, 4)
    return {
        "preset": PRESET,
        "sizes": Sizes.of(config)._asdict(),
        "device": DEVICES["h100"].name,
        "assumed": {name: getattr(options, name) for name in ("mfu", "bandwidth_use", "kernel_us")},
        "host waits": whole["host waits"],
        "milliseconds": round(total, 2),
        "milliseconds from features on": round(without, 2),
        "parts": rows,
    }
