"""Slot Contrast and VideoSAUR as published, straight from a state dict, in plain torch; and random state dicts.

The key names, shapes and conventions are those of the public code (martius-lab/slotcontrast, martius-lab/videosaur),
which saves a Lightning module: ``encoder.module`` and ``decoder.module`` are applied to each frame, and
``processor.module`` once for each frame in their order. Nothing of this project is used, so that its modules can be
compared with it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

HEADS = 4
CORRECTOR, PREDICTOR = "processor.module.corrector.", "processor.module.predictor.blocks.0."
BACKBONE = "encoder.module.backbone.model."


class Sizes(NamedTuple):
    """Sizes and options of a published configuration."""

    method: str
    channels: int  # C, width of the backbone's features
    dim: int  # D, width of the slots
    slots: int  # K
    patches: int  # M
    patch: int  # pixels
    hidden: int = 1024  # width of the decoder's hidden layers
    layers: int = 3  # their number
    blocks: int = 0  # of VideoSAUR's allocator
    features: bool = True  # whether the decoder reconstructs features
    dinov2: bool = True

    @property
    def out(self):
        similarities = self.patches if self.method == "videosaur" else 0
        return self.channels * self.features + similarities


# Of VideoSAUR's decoder the renderer's own output layer, with a ReLU after it, is a hidden layer too.
PUBLISHED = {
    "slot-contrast movi-c": Sizes("slot-contrast", 384, 64, 11, 576, 14),
    "slot-contrast movi-e": Sizes("slot-contrast", 768, 128, 15, 576, 14),
    "slot-contrast ytvis": Sizes("slot-contrast", 768, 64, 7, 1369, 14),
    "videosaur movi-c": Sizes("videosaur", 768, 128, 11, 784, 8, layers=4, blocks=2, features=False, dinov2=False),
    "videosaur movi-e": Sizes("videosaur", 768, 128, 15, 784, 8, layers=4, blocks=2, features=False, dinov2=False),
    "videosaur ytvis": Sizes("videosaur", 768, 64, 7, 196, 16, blocks=3, dinov2=False),
    "videosaur ytvis-dinov2": Sizes("videosaur", 768, 64, 7, 1369, 14, blocks=3),
}


def small(sizes):
    """The same layout with small widths. Depths and the number of slots are unchanged."""
    return sizes._replace(channels=12, dim=sizes.dim // 8, patches=9, hidden=20)


def random_state(sizes, seed=0):
    """A state dict with the published names and shapes: random weights, all far from initial ones."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def linear(name, width_in, width_out, bias=True):
        state[f"{name}.weight"] = draw(width_out, width_in) * width_in**-0.5
        if bias:
            state[f"{name}.bias"] = 0.3 * draw(width_out)

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.3 * draw(width), 0.3 * draw(width)

    def transformer(name):
        for each in ("norm1", "norm2"):
            norm(f"{name}{each}", d)
        linear(f"{name}self_attn.qkv", d, 3 * d)
        linear(f"{name}self_attn.out_proj", d, d)
        linear(f"{name}linear1", d, 4 * d)
        linear(f"{name}linear2", 4 * d, d)

    c, d, contrast = sizes.channels, sizes.dim, sizes.method == "slot-contrast"
    if contrast:
        state["initializer.slots"] = draw(1, sizes.slots, d) * d**-0.5
    else:
        state["initializer.mean"] = 0.3 * draw(1, 1, d)
        state["initializer.log_std"] = 0.3 * draw(1, 1, d) - 0.5
    state[f"{BACKBONE}patch_embed.proj.weight"] = draw(c, 3, sizes.patch, sizes.patch)
    state[f"{BACKBONE}cls_token"] = draw(1, 1, c)
    if sizes.dinov2:
        state[f"{BACKBONE}blocks.0.ls1.gamma"] = draw(c)
    norm("encoder.module.output_transform.layers.0", c)
    linear("encoder.module.output_transform.layers.1", c, 2 * c)
    linear("encoder.module.output_transform.layers.3", 2 * c, d)
    norm(f"{CORRECTOR}norm_features", d)
    norm(f"{CORRECTOR}norm_slots", d)
    for each in ("to_q", "to_k", "to_v"):
        linear(f"{CORRECTOR}{each}", d, d, bias=False)
    for side in ("ih", "hh"):
        state[f"{CORRECTOR}gru.weight_{side}"] = draw(3 * d, d) * d**-0.5
        state[f"{CORRECTOR}gru.bias_{side}"] = 0.3 * draw(3 * d)
    if contrast:
        norm(f"{CORRECTOR}mlp.layers.0", d)
        linear(f"{CORRECTOR}mlp.layers.1", d, 4 * d)
        linear(f"{CORRECTOR}mlp.layers.3", 4 * d, d)
    transformer(PREDICTOR)
    widths = [d, *[sizes.hidden] * sizes.layers]
    stem = "decoder.module.mlp" if contrast else "decoder.module.renderer"
    for index in range(sizes.layers):
        linear(f"{stem}.layers.{2 * index}", widths[index], widths[index + 1])
    if contrast:
        state["decoder.module.pos_emb"] = draw(1, 1, sizes.patches, d) * d**-0.5
        linear(f"{stem}.layers.{2 * sizes.layers}", sizes.hidden, sizes.out + 1)
        return state
    state["decoder.module.pos_emb"] = draw(1, sizes.patches, d) * d**-0.5
    for each in ("norm_memory", "norm_q", "norm_k"):
        norm(f"decoder.module.{each}", d)
    for each in ("to_q", "to_k"):
        linear(f"decoder.module.{each}", d, d, bias=False)
    for index in range(sizes.blocks):
        transformer(f"decoder.module.allocator.blocks.{index}.")
    linear("decoder.module.output_transform", sizes.hidden, sizes.out)
    return state


class Clip(NamedTuple):
    """Results of a clip of T frames."""

    slots: torch.Tensor  # [T, K, D]
    masks: torch.Tensor  # [T, M, K], of the decoder
    output: torch.Tensor  # [T, M, out], of the decoder


def forward(state, features, noise=None):
    """Slots, masks and output of the features [T, M, C] of a clip; VideoSAUR takes noise [K, D] for its draw."""
    x = norm_of(state, "encoder.module.output_transform.layers.0", features)
    x = linear_of(state, "encoder.module.output_transform.layers.1", x).relu()
    x = linear_of(state, "encoder.module.output_transform.layers.3", x)
    if "initializer.slots" in state:
        slots = state["initializer.slots"][0]
    else:
        slots = state["initializer.mean"][0] + noise * state["initializer.log_std"][0].exp()
    found = []
    for t, frame in enumerate(x):
        found.append(correct(state, frame, slots, 3 if t == 0 else 2))
        normed = norm_of(state, f"{PREDICTOR}norm1", found[-1])
        slots = feed_forward(state, PREDICTOR, found[-1] + attention(state, PREDICTOR, normed, normed))
    decode = broadcast if "initializer.slots" in state else mix
    decoded = [decode(state, each) for each in found]
    return Clip(torch.stack(found), *(torch.stack(each) for each in zip(*decoded, strict=True)))


def correct(state, frame, slots, iterations):
    """Slot attention [K, D] of a frame's tokens [M, D]; the GRU's state is the normalised slots."""
    tokens = norm_of(state, f"{CORRECTOR}norm_features", frame)
    k, v = (linear_of(state, f"{CORRECTOR}{each}", tokens) for each in ("to_k", "to_v"))
    gru = [state[f"{CORRECTOR}gru.{each}"] for each in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    for _ in range(iterations):
        slots = norm_of(state, f"{CORRECTOR}norm_slots", slots)
        logits = linear_of(state, f"{CORRECTOR}to_q", slots) @ k.T / k.shape[-1] ** 0.5
        weights = logits.softmax(0) + 1e-8
        slots = torch.gru_cell(weights / weights.sum(1, keepdim=True) @ v, slots, *gru)
        if f"{CORRECTOR}mlp.layers.0.weight" in state:
            hidden = linear_of(state, f"{CORRECTOR}mlp.layers.1", norm_of(state, f"{CORRECTOR}mlp.layers.0", slots))
            slots = slots + linear_of(state, f"{CORRECTOR}mlp.layers.3", hidden.relu())
    return slots


def attention(state, name, x, memory):
    """Multi-head attention of x [L, D] to a memory [S, D]; logits are MULTIPLIED by sqrt(d), as published."""
    weights, biases = state[f"{name}self_attn.qkv.weight"].chunk(3), state[f"{name}self_attn.qkv.bias"].chunk(3)
    q, k, v = (
        F.linear(tensor, weight, bias).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        for tensor, weight, bias in zip((x, memory, memory), weights, biases, strict=True)
    )
    mixed = (q @ k.mT * q.shape[-1] ** 0.5).softmax(-1) @ v
    return linear_of(state, f"{name}self_attn.out_proj", mixed.transpose(0, 1).flatten(1))


def feed_forward(state, name, x):
    hidden = linear_of(state, f"{name}linear1", norm_of(state, f"{name}norm2", x)).relu()
    return x + linear_of(state, f"{name}linear2", hidden)


def broadcast(state, slots):
    """Masks [M, K] and features [M, C] of slots [K, D]: an MLP at every slot and patch."""
    x = slots + state["decoder.module.pos_emb"][0, 0][:, None]  # [M, K, D]
    last = max(layers_of(state, "decoder.module.mlp"))
    for index in range(0, last, 2):
        x = linear_of(state, f"decoder.module.mlp.layers.{index}", x).relu()
    x = linear_of(state, f"decoder.module.mlp.layers.{last}", x)
    masks = x[..., -1].softmax(1)
    return masks, (masks[..., None] * x[..., :-1]).sum(1)


def mix(state, slots):
    """Masks [M, K] and output of slots [K, D]: an MLP at every patch, of a mixture of the slots."""
    positions = state["decoder.module.pos_emb"][0]
    x, memory = positions, norm_of(state, "decoder.module.norm_memory", slots)
    for block in range(blocks_of(state)):
        name = f"decoder.module.allocator.blocks.{block}."
        x = feed_forward(state, name, x + attention(state, name, norm_of(state, f"{name}norm1", x), memory))
    q = linear_of(state, "decoder.module.to_q", norm_of(state, "decoder.module.norm_q", x))
    k = linear_of(state, "decoder.module.to_k", norm_of(state, "decoder.module.norm_k", slots))
    masks = (q @ k.T / q.shape[-1] ** 0.5).softmax(1)
    x = masks @ slots + positions
    for index in sorted(layers_of(state, "decoder.module.renderer")):
        x = linear_of(state, f"decoder.module.renderer.layers.{index}", x).relu()
    return masks, linear_of(state, "decoder.module.output_transform", x)


def norm_of(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear_of(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layers_of(state, stem):
    return {int(name.removeprefix(f"{stem}.layers.").split(".")[0]) for name in state if name.startswith(stem)}


def blocks_of(state):
    return len({name.split(".")[4] for name in state if name.startswith("decoder.module.allocator.blocks.")})
