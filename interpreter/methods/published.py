"""Convert published checkpoints of Slot Contrast and VideoSAUR: names and layout of their parameters.

Both public codes save a Lightning module:

- ``encoder.module`` and ``decoder.module`` run on each frame;
- ``processor.module`` runs on the frames in their order: ``corrector`` is slot attention, ``predictor`` a transformer
  block;
- queries, keys and values of a transformer block are one matrix;
- the last layer of the decoder of Slot Contrast has the rows of the features, then one row for the logit of the mask;
- the decoder of VideoSAUR has three parts: ``allocator`` (the blocks), ``renderer`` (hidden layers of the MLP) and
  ``output_transform`` (its last layer).
"""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Published = Literal["slot-contrast", "videosaur"]
Names = dict[str, tuple[str, ...]]  # published name -> our names, whose rows it stacks

SHOWN = 20  # number of names that an error message lists
BACKBONE = "encoder.module.backbone."
PATCHES = f"{BACKBONE}model.patch_embed.proj.weight"
TOKENS = "encoder.module.output_transform.layers"
CORRECTOR, PREDICTOR = "processor.module.corrector", "processor.module.predictor.blocks.0"
POSITIONS = "decoder.module.pos_emb"
ALLOCATOR = "decoder.module.allocator.blocks"
WITH_BIAS = ("weight", "bias")
HIDDEN = {"slot-contrast": "decoder.module.mlp.layers", "videosaur": "decoder.module.renderer.layers"}
AXES = {  # of tensors with leading axes of length 1
    "slot-contrast": {"initializer.slots": 3, POSITIONS: 4},
    "videosaur": {"initializer.mean": 3, "initializer.log_std": 3, POSITIONS: 3},
}


class Layout(NamedTuple):
    """Layout of a checkpoint."""

    names: Names
    axes: Mapping[str, int]  # number of axes of the tensors with leading axes of length 1
    hidden_layers: int  # of the decoder
    blocks: int  # of VideoSAUR's allocator; 0 for Slot Contrast


def read_state(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a published file, by name.

    Args:
        path: Lightning checkpoint, ``{"state_dict": tensors}`` or the tensors alone (.ckpt, .pth, .pt), or
            .safetensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or holds no named tensors. The message tells what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = (
            f"import torch; c = torch.load('{path.name}', 'cpu', weights_only=False); "
            "torch.save({'state_dict': c['state_dict']}, 'tensors.pt')"
        )
        raise ValueError(
            f"{path} is damaged, or holds objects besides tensors, whose loading can run code. If you trust where it "
            f'comes from, extract its tensors in a sandbox, python -c "{code}", and convert tensors.pt '
            f"({_shortened(error)})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint ({_shortened(error)})") from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    named = isinstance(content, Mapping) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no named tensors, neither at its top nor below state_dict")
    return dict(content)


def read_layout(method: Published, state: Mapping[str, Tensor]) -> Layout:
    """Find the layout of a checkpoint, and check that it has all parameters of the method and no others.

    Raises:
        ValueError: with the names that are missing and those that are unexpected.
    """
    # Linear layers have even numbers. The last one of Slot Contrast is not a hidden layer.
    hidden_layers = max(1, _count(state, HIDDEN[method]) // 2 + (method == "videosaur"))
    blocks = max(1, _count(state, ALLOCATOR)) if method == "videosaur" else 0
    names = parameter_names(method, hidden_layers, blocks)
    missing = [name for name in names if name not in state]
    unexpected = [name for name in state if name not in names and not name.startswith(BACKBONE)]
    problems = [listed(*each) for each in (("missing", missing), ("unexpected", unexpected)) if each[1]]
    if problems:
        raise ValueError(f"not a published checkpoint of {method}: {'; '.join(problems)}")
    return Layout(names, AXES[method], hidden_layers, blocks)


def parameter_names(method: Published, hidden_layers: int, blocks: int) -> Names:
    """For the published name of each parameter, the names of our parameters whose rows it stacks.

    >>> parameter_names("slot-contrast", hidden_layers=3, blocks=0)["decoder.module.mlp.layers.6.bias"]
    ('decoder.to_features.bias', 'decoder.to_alpha.bias')
    """
    attention, hidden = "grouping.slot_attention", HIDDEN[method]
    tensors: Names = {POSITIONS: ("decoder.positions",)}
    modules: Names = {f"{TOKENS}.{i}": (f"to_tokens.{i}",) for i in (0, 1, 3)}  # layer 2 is the ReLU
    for side in ("ih", "hh"):
        tensors |= {f"{CORRECTOR}.gru.{kind}_{side}": (f"{attention}.gru.{kind}_{side}",) for kind in WITH_BIAS}
    tensors |= {f"{CORRECTOR}.to_{each}.weight": (f"{attention}.to_{each}.weight",) for each in "qkv"}
    modules |= {f"{CORRECTOR}.norm_features": (f"{attention}.norm_inputs",)}
    modules |= {f"{CORRECTOR}.norm_slots": (f"{attention}.norm_slots",)}
    modules |= _block(PREDICTOR, "grouping.predictor", "self")
    if method == "slot-contrast":
        tensors |= {"initializer.slots": ("initial.slots",)}
        for i, ours in ((0, "norm_mlp"), (1, "mlp.0"), (3, "mlp.2")):
            modules |= {f"{CORRECTOR}.mlp.layers.{i}": (f"{attention}.{ours}",)}
        modules |= {f"{hidden}.0": ("decoder.first",)}
        modules |= {f"{hidden}.{2 * i}": (f"decoder.hidden.{i - 1}",) for i in range(1, hidden_layers)}
        modules |= {f"{hidden}.{2 * hidden_layers}": ("decoder.to_features", "decoder.to_alpha")}
    else:
        tensors |= {f"initializer.{each}": (f"initial.{each}",) for each in ("mean", "log_std")}
        tensors |= {f"decoder.module.to_{each}.weight": (f"decoder.to_{each}.weight",) for each in "qk"}
        for theirs, ours in (("memory", "memory"), ("q", "queries"), ("k", "slots")):
            modules |= {f"decoder.module.norm_{theirs}": (f"decoder.norm_{ours}",)}
        for i in range(blocks):
            modules |= _block(f"{ALLOCATOR}.{i}", f"decoder.blocks.{i}", "cross")
        modules |= {f"{hidden}.{2 * i}": (f"decoder.mlp.{2 * i}",) for i in range(hidden_layers)}
        modules |= {"decoder.module.output_transform": (f"decoder.mlp.{2 * hidden_layers}",)}
    for theirs, stacked in modules.items():
        tensors |= {f"{theirs}.{kind}": tuple(f"{ours}.{kind}" for ours in stacked) for kind in WITH_BIAS}
    return tensors


def _block(theirs: str, ours: str, kind: Literal["self", "cross"]) -> Names:
    """Names of the modules of a transformer block."""
    return {
        f"{theirs}.norm1": (f"{ours}.norm_{kind}",),
        f"{theirs}.self_attn.qkv": (f"{ours}.attend_{kind}.to_q", f"{ours}.attend_{kind}.to_kv"),
        f"{theirs}.self_attn.out_proj": (f"{ours}.attend_{kind}.to_out",),
        f"{theirs}.norm2": (f"{ours}.norm_mlp",),
        f"{theirs}.linear1": (f"{ours}.mlp.0",),
        f"{theirs}.linear2": (f"{ours}.mlp.2",),
    }


def convert_state(
    state: Mapping[str, Tensor],
    layout: Layout,
    shapes: Mapping[str, Sequence[int]],  # of our parameters
) -> dict[str, Tensor]:
    """Convert the tensors to our parameters, in fp32.

    Raises:
        ValueError: with the tensors whose shapes do not fit the others.
    """
    weights: dict[str, Tensor] = {}
    wrong = []
    for theirs, ours in layout.names.items():
        tensor, rows = state[theirs], [shapes[name][0] for name in ours]
        expected = [sum(rows), *shapes[ours[0]][1:]]
        published = [1] * (layout.axes.get(theirs, 0) - len(expected)) + expected
        if list(tensor.shape) == published:
            parts = tensor.reshape(expected).float().split(rows)
            weights |= {name: part.contiguous().clone() for name, part in zip(ours, parts, strict=True)}
        else:
            wrong.append(f"{theirs} is {list(tensor.shape)} instead of {published}")
    if wrong:
        raise ValueError(f"the checkpoint's tensors do not fit each other: {listed('of the wrong shape', wrong)}")
    return weights


def side(state: Mapping[str, Tensor], name: str, axis: int, rank: int = 2) -> int:
    """Return the length of an axis of a tensor.

    Raises:
        ValueError: if the tensor has another number of axes.
    """
    shape = state[name].shape
    if len(shape) != rank:
        raise ValueError(f"{name} of the checkpoint is {list(shape)}; expected {rank} axes")
    return shape[axis]


def listed(title: str, entries: Sequence[str]) -> str:
    """Format a list, such as "2 missing (a, b)"."""
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return f"{len(entries)} {title} ({', '.join(entries[:SHOWN])}{more})"


def _count(names: Iterable[str], stem: str) -> int:
    """Number of layers named STEM.0, STEM.1 …: one more than the largest number; 0 if there are none."""
    numbers = (name.removeprefix(f"{stem}.").partition(".")[0] for name in names if name.startswith(f"{stem}."))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
