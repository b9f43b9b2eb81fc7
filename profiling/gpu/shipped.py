"""The launches whose resources are pinned: each op at the shapes that its benchmark and its limits name."""

from collections.abc import Callable, Iterator

import torch
from slotkernels.invariant_slot_attention import triton as invariant_slot_attention
from slotkernels.propagation import triton as propagation
from slotkernels.sinkhorn import triton as sinkhorn
from slotkernels.slot_attention import Settings
from slotkernels.slot_attention import triton as slot_attention
from slotkernels.slot_update import triton as slot_update

PRECISIONS = {torch.bfloat16: ("",), torch.float16: ("",), torch.float32: ("tf32x3", "ieee")}


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Label and call of every launch, on meta tensors."""
    yield from _inverted_attention()
    yield from _slot_update()
    yield from _invariant_attention()
    yield from _propagate_labels()
    yield from _sinkhorn()


def _inverted_attention() -> Iterator[tuple[str, Callable[[], object]]]:
    # (B, M, N, D, groups): the benchmark's, then the limits and what is in between.
    shapes = [(128, 864, 32, 768, 1), (96, 1152, 8, 768, 1), (64, 576, 11, 64, 1), (1, 864, 32, 768, 1),
              (8, 863, 20, 127, 1), (8, 864, 33, 1024, 1), (8, 864, 128, 1024, 1), (8, 864, 64, 384, 1),
              (8, 96, 11, 192, 1), (8, 864, 16, 768, 4)]  # fmt: skip
    for dtype, precisions in PRECISIONS.items():
        for batch, tokens, slots, dim, groups in shapes if dtype != torch.float16 else shapes[:1]:
            for precision in precisions if (slots, dim) == (32, 768) and batch > 1 else precisions[:1]:
                q, k = (torch.empty(batch, n, dim, dtype=dtype, device="meta") for n in (slots, tokens))
                for with_v in (False, True) if batch == 128 else (False,):
                    v = torch.empty_like(k) if with_v else None
                    bias = torch.empty(batch, slots, device="meta")
                    settings = Settings(dim**-0.5, 1e-8, 0.0, groups, precision or "ieee", not with_v)
                    name = f"B{batch} M{tokens} N{slots} D{dim}" + f" G{groups}" * (groups > 1) + " v" * with_v
                    name = f"{name} {str(dtype).removeprefix('torch.')} {precision}".strip()
                    yield (
                        f"inverted_attention forward {name}",
                        lambda a=(q, k, v, bias, None, settings): slot_attention.inverted_attention(*a),
                    )
                    for kind, need_k in (("queries", False), ("tokens", True)):
                        grads = (torch.empty_like(q), None, None)
                        saved = (torch.empty_like(q), torch.empty(batch, slots, device="meta"))
                        needs = (True, need_k, need_k and with_v, True)
                        arguments = (*grads, q, k, v, bias, None, *saved, settings, needs)
                        yield (
                            f"inverted_attention backward {kind} {name}",
                            lambda a=arguments: slot_attention.inverted_attention_backward(*a),
                        )


def _slot_update() -> Iterator[tuple[str, Callable[[], object]]]:
    for dim in (64, 256, 768, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            slots, norm = torch.empty(4096, dim, device="meta"), torch.empty(dim, device="meta")
            gates, update = (torch.empty(4096, n * dim, dtype=dtype, device="meta") for n in (3, 1))
            statistics = (torch.empty(4096, device="meta"), torch.empty(4096, device="meta"))
            name = f"D{dim} {str(dtype).removeprefix('torch.')}"
            for op, operands, saved in (
                ("gru_norm", (gates, gates, slots), (gates, gates, slots)),
                ("add_norm", (slots, update), (slots,)),
            ):
                forward, backward = getattr(slot_update, op), getattr(slot_update, f"{op}_backward")
                arguments = (*operands, norm, norm, 1e-5)
                yield f"{op} forward {name}", lambda f=forward, a=arguments: f(*a)
                arguments = (slots, update, *saved, norm, *statistics)
                yield f"{op} backward {name}", lambda f=backward, a=arguments: f(*a)


def _invariant_attention() -> Iterator[tuple[str, Callable[[], object]]]:
    # Shapes of SOLV (YTVIS-19), Biza et al. (CLEVRTex), this project's image stage and an odd one.
    # The last with a batch of one: Triton hands a kernel an argument of 1 as a constant.
    for batch, tokens, slots, dim, dtypes in (
        (64, 864, 8, 768, (torch.bfloat16, torch.float32)),
        (64, 1152, 11, 64, (torch.bfloat16,)),
        (64, 864, 32, 768, (torch.bfloat16,)),
        (64, 576, 33, 1024, (torch.float32,)),
        (1, 864, 8, 768, (torch.bfloat16,)),
    ):
        for dtype in dtypes:
            for norm in (False, True):
                name = f"M{tokens} N{slots} D{dim} {str(dtype).removeprefix('torch.')}" + " with norm" * norm
                name = name if batch > 1 else f"B{batch} {name}"

                def empty(*shape: int, dtype: torch.dtype = torch.float32, batch: int = batch) -> torch.Tensor:
                    return torch.empty(batch, *shape, dtype=dtype, device="meta")

                q, k = empty(slots, dim, dtype=dtype), empty(tokens, dim, dtype=dtype)
                bias, pairs = empty(slots), empty(slots, tokens)
                frame, shift = torch.empty(2, dim, device="meta"), torch.empty(dim, device="meta")
                place = (frame, empty(tokens, 2), empty(slots, 2), empty(slots, 2))
                deviations = (shift, pairs, pairs) if norm else (None, None, None)
                tensors, options = [q, bias, k, k, *place, *deviations], (dim**-0.5, 5.0, 1e-8, False, 1e-8)
                arguments = (tensors, None, *options)
                yield (
                    f"invariant_attention forward {name}",
                    lambda a=arguments: invariant_slot_attention.invariant_attention(*a),
                )
                grads = [q, pairs, None, place[2], place[3]]
                outputs = [pairs, pairs, place[2], place[3]]
                arguments = (grads, tensors, outputs, None, *options, [True] * 5 + [False] + [True] * 5)
                yield (
                    f"invariant_attention backward {name}",
                    lambda a=arguments: invariant_slot_attention.invariant_attention_backward(*a),
                )


def _propagate_labels() -> Iterator[tuple[str, Callable[[], object]]]:
    # (grid, N, K, size): YTVIS-19 with 8 and 20 objects, MOVi-E, HD, most objects, the demo, the grid, fewer pixels.
    for grid, slots, objects, size in (
        ((24, 36), 32, 8, (336, 504)),
        ((24, 36), 32, 20, (336, 504)),
        ((24, 24), 32, 20, (336, 336)),
        ((24, 36), 32, 8, (720, 1280)),
        ((24, 36), 33, 255, (336, 504)),
        ((12, 18), 11, 8, (128, 192)),
        ((24, 36), 32, 8, (24, 36)),
        ((24, 36), 32, 8, (10, 15)),
    ):
        for dtype in (torch.float32, torch.bfloat16) if size == (336, 504) else (torch.float32,):
            image = torch.empty(4, 36, grid[0] * grid[1], slots, dtype=dtype, device="meta")
            video = torch.empty(4, 36, slots, objects, dtype=dtype, device="meta")
            clusters = torch.empty(4, objects, dtype=torch.int64, device="meta")
            name = f"{grid[0]}x{grid[1]} N{slots} K{objects} {size[0]}x{size[1]} {str(dtype).removeprefix('torch.')}"
            for extras, labels in ((False, None), (True, None), (True, clusters)):
                label = f"propagate_labels {name}" + " with extras" * extras + " merged" * (labels is not None)
                arguments = (image, video, labels, *grid, *size, extras, extras)
                yield label, lambda a=arguments: propagation.propagate_labels(*a)


def _sinkhorn() -> Iterator[tuple[str, Callable[[], object]]]:
    single, half = torch.float32, torch.bfloat16
    video = (3456, 32, 32, 768)  # the frames of 96 videos, 32 image slots each
    wide, limit = (1024, 64, 64, 256), (512, 128, 128, 256)  # all matrices at once, one at a time
    # (B, N, M, D), dtype, precision, p, diameter (None: of the batch), gradients of both sets, weights
    for shape, dtype, precision, p, diameter, both, weighted in (
        (video, single, "tf32x3", 2, 100.0, False, False),
        (video, single, "tf32x3", 2, None, False, False),
        (video, single, "tf32x3", 2, "problem", False, False),
        (video, single, "tf32x3", 1, 100.0, True, True),
        (video, single, "tf32", 2, 100.0, False, False),
        (video, single, "ieee", 2, 100.0, False, False),
        (video, half, "", 2, None, False, False),
        ((4096, 11, 11, 128), single, "tf32x3", 2, 100.0, True, False),
        ((64, 8, 20, 63), single, "tf32x3", 2, "problem", True, True),
        ((2304, 20, 20, 768), single, "tf32x3", 2, 100.0, False, False),
        (wide, single, "tf32x3", 2, 100.0, False, False),
        (wide, single, "tf32x3", 1, "problem", True, True),
        (wide, single, "ieee", 2, None, True, False),
        (limit, single, "tf32x3", 2, 100.0, False, False),
        (limit, single, "tf32x3", 1, "problem", True, True),
        (limit, single, "ieee", 2, "problem", True, True),
        (limit, half, "", 1, 100.0, True, False),
        ((512, 100, 50, 300), single, "tf32x3", 2, 100.0, True, False),
    ):
        (batch, n, m, dim), kind = shape, str(dtype).removeprefix("torch.")
        x, y = (torch.empty(batch, count, dim, dtype=dtype, device="meta") for count in (n, m))
        a, b = (torch.empty(batch, count, device="meta") if weighted else None for count in (n, m))
        name = f"B{batch} N{n} M{m} D{dim} {kind} {precision} p{p} {'batch' if diameter is None else diameter}"
        name = " ".join(name.split()) + " both" * both + " weights" * weighted
        start = diameter if isinstance(diameter, float) else None
        arguments = (x, y, a, b, start, diameter == "problem", p, 0.05, 0.5, True, True, both, precision)
        yield f"sinkhorn forward {name}", lambda a=arguments: sinkhorn.sinkhorn(*a)
        pulls = [torch.empty(batch, count, n + m, device="meta") for count in (n, m)]
        grads = (torch.empty(1, device="meta").expand(batch), None, None)
        arguments = (*grads, x, y, a, b, pulls[0], pulls[1] if both else None, precision)
        yield f"sinkhorn backward {name}", lambda a=arguments: sinkhorn.sinkhorn_backward(*a)
