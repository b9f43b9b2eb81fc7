"""The launches whose resources are pinned: each op at the shapes that its benchmark and its limits name."""

from collections.abc import Callable, Iterator

import torch
from slotkernels.invariant_slot_attention import triton as invariant_slot_attention
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
    for tokens, slots, dim, dtypes in (
        (864, 8, 768, (torch.bfloat16, torch.float32)),
        (1152, 11, 64, (torch.bfloat16,)),
        (864, 32, 768, (torch.bfloat16,)),
        (576, 33, 1024, (torch.float32,)),
    ):
        for dtype in dtypes:
            for norm in (False, True):
                name = f"M{tokens} N{slots} D{dim} {str(dtype).removeprefix('torch.')}" + " with norm" * norm

                def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                    return torch.empty(64, *shape, dtype=dtype, device="meta")

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


def _sinkhorn() -> Iterator[tuple[str, Callable[[], object]]]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    # (B, N, M, D): the video stage's sets, other numbers of slots, the limits of what is held at once.
    most, few, tiny, odd = (3456, 32, 32, 768), (4096, 11, 11, 128), (8192, 8, 8, 64), (2304, 20, 20, 768)
    wide, limit, uneven = (1024, 64, 64, 256), (512, 128, 128, 256), (512, 100, 50, 300)
    single, half = torch.float32, torch.bfloat16
    number, batch, problem = (4.0, False), (None, False), (None, True)
    one, both = (True, False), (True, True)
    # shape, dtype, precision, diameter, kept pulls, p, weights, debias
    forward = [
        (most, single, "tf32x3", number, one, 2, False, True),
        (most, single, "tf32x3", batch, one, 2, False, True),
        (most, single, "tf32x3", problem, both, 1, True, True),
        (most, single, "ieee", number, both, 2, False, True),
        (most, single, "tf32", number, one, 2, False, True),
        (most, half, "", number, one, 2, False, True),
        (most, half, "", batch, both, 1, True, True),
        (few, single, "tf32x3", number, both, 2, False, True),
        (tiny, single, "tf32x3", problem, one, 2, True, False),
        (odd, single, "tf32x3", number, one, 2, False, True),
        (wide, single, "tf32x3", number, one, 2, False, True),
        (wide, single, "tf32x3", problem, both, 1, True, True),
        (wide, single, "ieee", number, one, 2, False, True),
        (wide, half, "", number, both, 2, False, True),
        (limit, single, "tf32x3", number, one, 2, False, True),
        (limit, single, "tf32x3", problem, both, 1, True, True),
        (limit, single, "ieee", number, one, 2, False, True),
        (limit, single, "tf32", batch, one, 2, False, True),
        (limit, half, "", number, both, 2, False, True),
        (uneven, single, "tf32x3", number, both, 2, True, False),
    ]
    for (b, n, m, d), dtype, precision, diameter, kept, p, weighted, debias in forward:
        kind = {number: "number", batch: "batch", problem: "problem"}[diameter]
        name = f"B{b} N{n} M{m} D{d} {str(dtype).removeprefix('torch.')} {precision} p{p} {kind}".replace("  ", " ")
        name += " both" * kept[1] + " weighted" * weighted + " biased" * (not debias)
        points = empty(b, n, d, dtype=dtype), empty(b, m, d, dtype=dtype)
        weights = (empty(b, n), empty(b, m)) if weighted else (None, None)
        arguments = (*points, *weights, *diameter, p, 0.05, 0.5, debias, *kept, precision)
        yield f"sinkhorn forward {name}", lambda a=arguments: sinkhorn.sinkhorn(*a)
    backward = [
        (most, single, "tf32x3", one, False),
        (most, single, "ieee", both, True),
        (most, single, "tf32", one, False),
        (most, half, "", one, False),
        (few, single, "tf32x3", one, False),
        (wide, single, "tf32x3", both, True),
        (limit, single, "tf32x3", both, False),
        (limit, single, "ieee", one, False),
        (limit, half, "", both, True),
        (uneven, single, "tf32x3", both, True),
    ]
    for (b, n, m, d), dtype, precision, kept, weighted in backward:
        name = f"B{b} N{n} M{m} D{d} {str(dtype).removeprefix('torch.')} {precision}".strip()
        name += " both" * kept[1] + " weighted" * weighted
        points = empty(b, n, d, dtype=dtype), empty(b, m, d, dtype=dtype)
        weights = (empty(b, n), empty(b, m)) if weighted else (None, None)
        pulls = empty(b, n, n + m), empty(b, m, n + m) if kept[1] else None
        arguments = (empty(1).expand(b), None, None, *points, *weights, *pulls, precision)
        yield f"sinkhorn backward {name}", lambda a=arguments: sinkhorn.sinkhorn_backward(*a)
