"""Operations and bytes of the parts of a training step, from the sizes alone.

A multiply-add counts as two operations, and the backward pass of a product as two products. A part of products only has
bytes if its op has a formula for them (slot attention, Sinkhorn): memory does not limit other large products, and their
reads and writes are part of their time. Each transformer has a second part with the bytes of its kernels between the
products, under bfloat16 autocast and fused as by torch.compile: every input and every output counts once.
"""

from dataclasses import dataclass

import torch
from slotkernels import sinkhorn, slot_attention
from slotkernels.slot_attention.prepared import absorbs, saved_by_merging
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from interpreter.configs import FeatureStageConfig
from interpreter.methods.interpreter.config import ImageTraining, VideoTraining
from interpreter.models.backbones import EfficientNetLite0
from interpreter.models.transformer import absorbs as absorbs_attention
from profiling.common.setups import FEATURES

# Bytes per token and channel of a block's kernels between the products, forward and backward: fp32 stream, bf16
# operands; reads and writes in order. A product's result is added to the stream and the sum normalised in one kernel.
NORM, NORM_BACKWARD = (4 + 2) + (4 + 2), (2 + 4 + 4) + (4 + 2)
GELU, GELU_BACKWARD = 8 + 8, (8 + 8) + 8  # of a layer 4 times as wide
SOFTMAX, SOFTMAX_BACKWARD = 2 + 2, (2 + 2) + 2  # per token, head and slot of absorbed cross-attention
DECODER = "shared"  # in result files: what is equal for all samples is computed once, see :func:`decoder`
ADAMW = 4 * (4 + 3)  # bytes per parameter: weight, gradient and two moments read; all but the gradient written
VIT_LAYERS = 12


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Args:
        name: shown in tables; parts of the same name are added up.
        flops: operations.
        bytes: memory traffic.
        single: operations are scalar ones in float32, not products for tensor cores.
    """

    name: str
    flops: float
    bytes: float = 0.0
    single: bool = False

    def times(self, factor: float) -> "Part":
        """The part, repeated."""
        return Part(self.name, self.flops * factor, self.bytes * factor, self.single)


def between(norms: int, *, train: bool = True) -> int:
    """Bytes per token and channel of a block's kernels between the products, with ``norms`` LayerNorms."""
    return norms * (NORM + train * NORM_BACKWARD) + GELU + train * GELU_BACKWARD


def transformer(
    name: str, batch: int, tokens: int, dim: int, layers: int, *, out_dim: int = 0, train: bool = True
) -> list[Part]:
    """Products, and the kernels between them, of an encoder's pre-norm blocks, and of a linear layer after them."""
    block = tokens * (24 * dim * dim + 4 * tokens * dim)
    passes, head = batch * (3 if train else 1), 2 * tokens * dim * out_dim
    moved = batch * layers * tokens * dim * between(2, train=train)
    return [Part(name, passes * (layers * block + head)), Part(f"{name}, between products", 0, moved)]


def decoder(
    batch: int, tokens: int, dim: int, layers: int, heads: int, slots: int, out_dim: int, *, textbook: bool = False
) -> list[Part]:
    """Products, and the kernels between them, of a step of the transformer decoder.

    The first block's self-attention, and its queries of the slots, are computed once a step; projections of queries and
    results are applied to the slots where that takes less. ``textbook``: neither, as in steps measured before.
    """
    attend_self, project, mlp = tokens * (8 * dim * dim + 4 * tokens * dim), 2 * tokens * dim * dim, 16 * dim * dim
    columns, once = heads * slots, 0 if textbook else 1  # blocks that begin once a step
    if not textbook and absorbs_attention(tokens, slots, heads, dim):
        queries, rest, softmax = 0, 8 * slots * dim * dim + 4 * tokens * columns * dim, SOFTMAX + SOFTMAX_BACKWARD
    else:
        queries, rest, softmax = project, project + 4 * slots * dim * dim + 4 * tokens * slots * dim, 0
    begin = attend_self + queries
    of_sample = (layers - once) * begin + layers * (rest + tokens * mlp) + 2 * tokens * dim * out_dim
    norms = layers * between(3) - 2 * once * (NORM + NORM_BACKWARD)
    moved = batch * tokens * (dim * norms + layers * columns * softmax)
    return [
        Part("decoder", 3 * (batch * of_sample + once * begin)),
        Part("decoder, between products", 0, moved),
    ]


def slot_attention_parts(
    batch: int, slots: int, tokens: int, dim: int, input_dim: int, iterations: int, *, train: bool, token_gradient: bool
) -> list[Part]:
    """Iterations over the tokens, of which the last is differentiated, and the slots' own products."""
    name, backward = "slot attention", int(train)
    rows, width = 2 * batch * slots, 15 * dim * dim  # q, GRU (6), MLP (8)
    parts = [Part(f"{name}, norm of tokens", 0, 6 * batch * tokens * input_dim)]  # fp32 read, bf16 written
    saved = 0
    if absorbs(tokens, slots, dim, input_dim, iterations, backward):
        width, token_dim = width + 2 * dim * input_dim, input_dim
        free = batch * slots * (iterations - 1) if train else 0  # slots without gradients, in a step with them
        saved = sum(2 * max(0, saved_by_merging(free, outputs, (dim, input_dim))) for outputs in (dim, 3 * dim))
    else:
        token_dim = dim
        parts.append(Part(f"{name}, keys and values", 4 * batch * tokens * dim * input_dim * (1 + 2 * backward)))
    parts.append(Part(f"{name}, slots", (iterations + 2 * backward) * rows * width - saved))
    sizes = (batch, slots, tokens, token_dim)
    forward = Part(name, slot_attention.flops(*sizes), slot_attention.bytes_moved(*sizes, itemsize=2))
    parts.append(forward.times(iterations))
    if train:
        kind = "tokens" if token_gradient else "queries"
        moved = slot_attention.bytes_moved(*sizes, itemsize=2, backward=kind)
        parts.append(Part(name, slot_attention.flops(*sizes, backward=kind), moved))
    return parts


def backbone(config: FeatureStageConfig, frames: int, kept: int | None = None, label: str = "backbone") -> list[Part]:
    """The frozen backbone on some frames; the blocks of a ViT on all patches, or on as many as are kept of each."""
    (height, width), name = config.data.frame_size, config.backbone.backbone
    if name == "efficientnet-lite0":
        return [Part(label, frames * _efficientnet_flops(height, width))]
    dim, patch = FEATURES[name]
    tokens = (height // patch) * (width // patch)
    last = config.backbone.feature_layer
    layers = VIT_LAYERS if last is None else last % VIT_LAYERS + 1
    embed = Part(label, frames * 2 * tokens * dim * 3 * patch**2)
    return [embed, *transformer(label, frames, (kept or tokens) + 1, dim, layers, train=False)]


def _efficientnet_flops(height: int, width: int) -> float:
    model = EfficientNetLite0()
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.features(torch.empty(1, height, width, 3, dtype=torch.uint8))
    return counter.get_total_flops()


def image_encode(config: ImageTraining, frames: int, *, train: bool = False) -> list[Part]:
    """Slot attention of the image stage."""
    model, (dim, tokens) = config.model, features(config)
    sizes = (frames, model.num_slots, tokens, model.dim, dim, model.iterations if train else model.inference_iterations)
    return slot_attention_parts(*sizes, train=train, token_gradient=False)


def image_step(config: ImageTraining, batch: int, parameters: int, *, textbook: bool = False) -> list[Part]:
    """A training step of the image stage on stored features; ``textbook`` as in :func:`decoder`."""
    model, (dim, tokens) = config.model, features(config)
    sizes = (batch, tokens, model.dim, model.decoder_layers, model.heads, model.num_slots, dim)
    return [
        *image_encode(config, batch, train=True),
        *decoder(*sizes, textbook=textbook),
        Part("loss", 0, batch * tokens * dim * (2 + 4 + 2)),
        Part("optimizer", 0, ADAMW * parameters),
    ]


def video_step(
    config: VideoTraining, image: ImageTraining, batch: int, parameters: int, *, textbook: bool = False
) -> list[Part]:
    """A training step of the video stage on stored image slots, or on the stored means of their tokens; ``textbook`` as
    in :func:`decoder`."""
    model, frames, slots = config.model, config.num_frames, image.model.num_slots
    width = image.model.dim if model.inputs == "slots" else features(image)[0] + 2
    tokens, count = frames * slots, model.num_slots
    sizes = (batch, count, tokens, model.dim, model.dim, model.iterations)
    embed = 2 * 2 * batch * tokens * width * model.dim if width != model.dim else 0  # the inputs need no gradient
    return [
        Part("encoder", embed),
        *transformer("encoder", batch, tokens, model.dim, model.encoder_layers),
        *slot_attention_parts(*sizes, train=True, token_gradient=True),
        *(
            _mask_decoder(config, batch, slots, width)
            if model.decoder == "masks"
            else _set_decoder(config, batch, slots, width, textbook)
        ),
        Part("optimizer", 0, ADAMW * parameters),
    ]


def _set_decoder(config: VideoTraining, batch: int, slots: int, width: int, textbook: bool) -> list[Part]:
    """A transformer decoder and the Sinkhorn divergence."""
    model, frames = config.model, config.num_frames
    pairs, kept = (batch * frames, slots, slots, width), (True, False)
    sizes = (batch, frames * slots, model.dim, model.decoder_layers, model.heads, model.num_slots, width)
    back = (sinkhorn.flops(*pairs, kept=kept, backward=True), sinkhorn.bytes_moved(*pairs, kept=kept, backward=True))
    return [
        *decoder(*sizes, textbook=textbook),
        Part("loss", sinkhorn.flops(*pairs, kept=kept), sinkhorn.bytes_moved(*pairs, kept=kept), single=True),
        Part("loss", *back, single=True),
    ]


def _mask_decoder(config: VideoTraining, batch: int, slots: int, width: int) -> list[Part]:
    """Linear functions of the slots, weighted by their attention, and the squared error."""
    tokens, count = config.num_frames * slots, config.model.num_slots
    products = 3 * 2 * batch * count * width * (config.model.dim + tokens)
    return [Part("decoder", products), Part("loss", 0, batch * tokens * width * (2 + 4 + 2))]


def features(config: ImageTraining) -> tuple[int, int]:
    """Width and number of a frame's features."""
    dim, patch = FEATURES[config.backbone.backbone]
    return dim, (config.data.frame_size[0] // patch) * (config.data.frame_size[1] // patch)


def cache_bytes(image: ImageTraining, video: VideoTraining) -> tuple[int, int]:
    """Bytes of a frame in the cache: its features; its image slots, their attention and, if the video stage reads them,
    the means of their tokens, of all draws. Both flips."""
    dim, tokens = features(image)
    slots, flips = image.model.num_slots, 1 + image.optim.flip
    means = dim + 2 if video.model.inputs == "means" else 0
    return 2 * flips * tokens * dim, 2 * flips * video.draws * slots * (image.model.dim + tokens + means)
