"""The launches whose resources are pinned: each op at the shapes that its benchmark and its limits name."""

from collections.abc import Callable, Iterator

import torch
from slotkernels.guided_labels import triton as guided_labels
from slotkernels.guided_labels.op import GuidedArguments, default_radius
from slotkernels.invariant_slot_attention import op as invariant_op
from slotkernels.invariant_slot_attention import triton as invariant_slot_attention
from slotkernels.matching import op as matching_op
from slotkernels.matching import triton as matching
from slotkernels.mixing import op as mixing_op
from slotkernels.mixing import triton as mixing
from slotkernels.propagation import triton as propagation
from slotkernels.propagation.op import LabelArguments
from slotkernels.sinkhorn import problem as sinkhorn_problem
from slotkernels.sinkhorn import triton as sinkhorn
from slotkernels.slot_attention import triton as slot_attention
from slotkernels.slot_attention.op import Arguments, BackwardArguments, Cotangents
from slotkernels.slot_update import triton as slot_update
from slotkernels.slot_update.op import (
    AddNormArguments,
    AddNormBackwardArguments,
    GruNormArguments,
    GruNormBackwardArguments,
)
from slotkernels.transport_plan import problem as plan_problem
from slotkernels.transport_plan import triton as transport_plan
from slotkernels.transport_targets import op as transport_op
from slotkernels.transport_targets import triton as transport_targets

PRECISIONS = {torch.bfloat16: ("",), torch.float16: ("",), torch.float32: ("tf32x3", "ieee")}


def shipped() -> Iterator[tuple[str, Callable[[], object]]]:
    """Label and call of every launch, on meta tensors."""
    yield from _inverted_attention()
    yield from _slot_update()
    yield from _invariant_attention()
    yield from _propagate_labels()
    yield from _guided_labels()
    yield from _mix_slots()
    yield from _match_slots()
    yield from _sinkhorn()
    yield from _transport_targets()
    yield from _sinkhorn_plan()


def _inverted_attention() -> Iterator[tuple[str, Callable[[], object]]]:
    # (B, M, N, D, groups): the benchmark's, then the limits and what is in between.
    shapes = [(128, 864, 32, 768, 1), (96, 1152, 8, 768, 1), (64, 576, 11, 64, 1), (1, 864, 32, 768, 1),
              (8, 863, 20, 127, 1), (8, 864, 33, 1024, 1), (8, 864, 128, 1024, 1), (8, 864, 64, 384, 1),
              (8, 96, 11, 192, 1), (8, 864, 16, 768, 4), (128, 256, 16, 384, 1), (128, 256, 64, 384, 16),
              (128, 864, 64, 384, 16)]  # fmt: skip
    for dtype, precisions in PRECISIONS.items():
        for batch, tokens, slots, dim, groups in shapes if dtype != torch.float16 else shapes[:1]:
            for precision in precisions if (slots, dim) == (32, 768) and batch > 1 else precisions[:1]:
                q, k = (torch.empty(batch, n, dim, dtype=dtype, device="meta") for n in (slots, tokens))
                masked = dim == 384 and groups > 1  # SMTC's instances see tokens of their semantic
                mask = torch.empty(batch, groups, tokens, dtype=torch.bool, device="meta") if masked else None
                for with_v in (False, True) if (batch, dim) == (128, 768) else (False,):
                    v = torch.empty_like(k) if with_v else None
                    bias = torch.empty(batch, slots, device="meta")
                    options = (dim**-0.5, 1e-8, 0.0, groups, precision or "ieee", not with_v)
                    forward = Arguments(q, k, v, bias, mask, *options)
                    name = f"B{batch} M{tokens} N{slots} D{dim}" + f" G{groups}" * (groups > 1)
                    name += " masked" * masked + " v" * with_v
                    name = f"{name} {str(dtype).removeprefix('torch.')} {precision}".strip()
                    yield (
                        f"inverted_attention forward {name}",
                        lambda a=forward: slot_attention.inverted_attention(a),
                    )
                    for kind, need_k in (("queries", False), ("tokens", True)):
                        grads = Cotangents(torch.empty_like(q), None, None)
                        saved = (torch.empty_like(q), torch.empty(batch, slots, device="meta"))
                        needs = [True, need_k, need_k and with_v, True, False]
                        backward = BackwardArguments(grads, forward, *saved, needs)
                        yield (
                            f"inverted_attention backward {kind} {name}",
                            lambda a=backward: slot_attention.inverted_attention_backward(a),
                        )


def _slot_update() -> Iterator[tuple[str, Callable[[], object]]]:
    for dim in (64, 256, 768, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            slots, norm = torch.empty(4096, dim, device="meta"), torch.empty(dim, device="meta")
            gates, update = (torch.empty(4096, n * dim, dtype=dtype, device="meta") for n in (3, 1))
            statistics = (torch.empty(4096, device="meta"), torch.empty(4096, device="meta"))
            name = f"D{dim} {str(dtype).removeprefix('torch.')}"
            forward = GruNormArguments(gates, gates, slots, norm, norm, 1e-5)
            yield f"gru_norm forward {name}", lambda a=forward: slot_update.gru_norm(a)
            backward = GruNormBackwardArguments(slots, update, gates, gates, slots, norm, *statistics)
            yield f"gru_norm backward {name}", lambda a=backward: slot_update.gru_norm_backward(a)
            sums = AddNormArguments(slots, update, norm, norm, 1e-5)
            yield f"add_norm forward {name}", lambda a=sums: slot_update.add_norm(a)
            of_sums = AddNormBackwardArguments(slots, update, slots, norm, *statistics)
            yield f"add_norm backward {name}", lambda a=of_sums: slot_update.add_norm_backward(a)


def _invariant_attention() -> Iterator[tuple[str, Callable[[], object]]]:
    # Shapes of SOLV at the width of its features and at its own (YTVIS-19, half of the tokens dropped), of Biza et al.
    # (CLEVRTex) and of this project's image stage, and an odd one. The last has a batch of one: Triton hands a kernel
    # an argument of 1 as a constant.
    for batch, tokens, slots, dim, dtypes in (
        (64, 864, 8, 768, (torch.bfloat16, torch.float32)),
        (240, 432, 8, 128, (torch.bfloat16, torch.float32)),
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
                tensors = (q, bias, k, k, *place, *deviations, None)
                forward = invariant_op.Arguments._make((*tensors, dim**-0.5, 5.0, 1e-8, False, 1e-8))
                yield (
                    f"invariant_attention forward {name}",
                    lambda a=forward: invariant_slot_attention.invariant_attention(a),
                )
                grads = invariant_op.Cotangents(q, pairs, None, place[2], place[3])
                for learns_grid in (False, True):
                    needs = [True] * 5 + [learns_grid] + [True] * 5 + [False]
                    backward = invariant_op.BackwardArguments(grads, forward, pairs, pairs, place[2], place[3], needs)
                    yield (
                        f"invariant_attention backward {name}" + " with grid" * learns_grid,
                        lambda a=backward: invariant_slot_attention.invariant_attention_backward(a),
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
            for extras, merged in ((False, None), (True, None), (True, clusters)):
                label = f"propagate_labels {name}" + " with extras" * extras + " merged" * (merged is not None)
                arguments = LabelArguments(image, video, merged, *grid, *size, extras, extras)
                yield label, lambda a=arguments: propagation.propagate_labels(a)


def _guided_labels() -> Iterator[tuple[str, Callable[[], object]]]:
    # (grid, K, size, subsample): DAVIS, YTVIS-19, most objects, the exact filter of the demo.
    for grid, objects, size, subsample in (
        ((24, 36), 8, (480, 854), 4),
        ((24, 36), 20, (336, 504), 4),
        ((24, 36), 255, (336, 504), 4),
        ((12, 18), 11, (128, 192), 1),
    ):
        image = torch.empty(1, 1, grid[0] * grid[1], 16, device="meta")
        video = torch.empty(1, 1, 16, objects, device="meta")
        guide = torch.empty(1, 1, *size, 3, dtype=torch.uint8, device="meta")
        window = round(default_radius(grid, size) / subsample)
        for extras in (False, True):
            arguments = GuidedArguments(image, video, None, guide, *grid, window, 1e-4, subsample, extras, extras)
            label = f"guided_labels {grid[0]}x{grid[1]} K{objects} {size[0]}x{size[1]} subsample {subsample}"
            yield label + " with extras" * extras, lambda a=arguments: guided_labels.guided_labels(a)


def _mix_slots() -> Iterator[tuple[str, Callable[[], object]]]:
    # (B, K, M, H): Slot Contrast (YTVIS-21, MOVi-E), DINOSAUR (YTVIS-19), the demo, the limits, one sample and slot.
    for shape, dtypes in (
        ((256, 7, 1369, 1024), (torch.bfloat16, torch.float32)),
        ((256, 15, 576, 1024), (torch.bfloat16,)),
        ((64, 7, 196, 2048), (torch.bfloat16, torch.float16)),
        ((32, 11, 96, 256), (torch.bfloat16, torch.float32)),
        ((64, 24, 864, 768), (torch.bfloat16,)),
        ((4, 256, 196, 2048), (torch.float32,)),
        ((1, 1, 1369, 1024), (torch.bfloat16,)),
    ):
        batch, slots, patches, dim = shape
        for dtype in dtypes:
            hidden, mixed = (torch.empty(*s, dtype=dtype, device="meta") for s in (shape, (batch, patches, dim)))
            weight, bias = torch.empty(dim, device="meta"), torch.empty((), device="meta")
            masks = torch.empty(batch, patches, slots, device="meta")
            for valid in (None, torch.empty(batch, slots, dtype=torch.bool, device="meta")):
                name = f"B{batch} K{slots} M{patches} H{dim} {str(dtype).removeprefix('torch.')}"
                name += " valid" * (valid is not None)
                forward = mixing_op.Arguments(hidden, weight, bias, valid)
                yield f"mix_slots forward {name}", lambda a=forward: mixing.mix_slots(a)
                for of_masks in (None, masks):
                    grads = mixing_op.Cotangents(mixed, of_masks)
                    backward = mixing_op.BackwardArguments(grads, hidden, weight, valid, masks)
                    label = f"mix_slots backward {name}" + " masks" * (of_masks is not None)
                    yield label, lambda a=backward: mixing.mix_slots_backward(a)


def _match_slots() -> Iterator[tuple[str, Callable[[], object]]]:
    # (pairs of frames, semantics, P): SMTC, fewer and more instances, and one problem.
    for leading, count, dtypes in (
        ((12, 32, 16), 4, (torch.float32, torch.bfloat16, torch.float16)),
        ((12, 32, 16), 1, (torch.float32,)),
        ((12, 32, 16), 2, (torch.float32,)),
        ((12, 32, 16), 3, (torch.float32,)),
        ((12, 32, 16), 5, (torch.float32, torch.bfloat16)),
        ((), 4, (torch.float32,)),
    ):
        for dtype in dtypes:
            similarity = torch.empty(*leading, count, count, dtype=dtype, device="meta")
            name = f"{' '.join(map(str, leading)) or 'one'} P{count} {str(dtype).removeprefix('torch.')}"
            arguments = matching_op.Arguments(similarity)
            yield f"match_slots {name}", lambda a=arguments: matching.match_slots(a)


def _sinkhorn() -> Iterator[tuple[str, Callable[[], object]]]:
    single, half = torch.float32, torch.bfloat16
    video = (3456, 32, 32, 768)  # the frames of 96 videos, 32 image slots each
    wide, limit = (1024, 64, 64, 256), (512, 128, 128, 256)  # all matrices at once, one at a time
    # (B, N, M, D), dtype, precision, p, diameter (None: of the batch), gradients of both sets, weights, reach
    for shape, dtype, precision, p, diameter, both, weighted, reach in (
        (video, single, "tf32x3", 2, 100.0, False, False, None),
        (video, single, "tf32x3", 2, None, False, False, None),
        (video, single, "tf32x3", 2, "problem", False, False, None),
        (video, single, "tf32x3", 1, 100.0, True, True, None),
        (video, single, "tf32", 2, 100.0, False, False, None),
        (video, single, "ieee", 2, 100.0, False, False, None),
        (video, half, "", 2, None, False, False, None),
        ((4096, 11, 11, 128), single, "tf32x3", 2, 100.0, True, False, None),
        ((64, 8, 20, 63), single, "tf32x3", 2, "problem", True, True, None),
        ((2304, 20, 20, 768), single, "tf32x3", 2, 100.0, False, False, None),
        (wide, single, "tf32x3", 2, 100.0, False, False, None),
        (wide, single, "tf32x3", 1, "problem", True, True, None),
        (wide, single, "ieee", 2, None, True, False, None),
        (limit, single, "tf32x3", 2, 100.0, False, False, None),
        (limit, single, "tf32x3", 1, "problem", True, True, None),
        (limit, single, "ieee", 2, "problem", True, True, None),
        (limit, half, "", 1, 100.0, True, False, None),
        ((512, 100, 50, 300), single, "tf32x3", 2, 100.0, True, False, None),
        (video, single, "tf32x3", 2, 100.0, False, False, 1.0),
        (video, single, "tf32x3", 1, None, True, True, 1.0),
        (limit, single, "tf32x3", 2, 100.0, True, False, 1.0),
    ):
        (batch, n, m, dim), kind = shape, str(dtype).removeprefix("torch.")
        x, y = (torch.empty(batch, count, dim, dtype=dtype, device="meta") for count in (n, m))
        a, b = (torch.empty(batch, count, device="meta") if weighted else None for count in (n, m))
        name = f"B{batch} N{n} M{m} D{dim} {kind} {precision} p{p} {'batch' if diameter is None else diameter}"
        name = " ".join(name.split()) + " both" * both + " weights" * weighted
        name += "" if reach is None else f" reach {reach:g}"
        start = diameter if isinstance(diameter, float) else None
        options = (start, diameter == "problem", p, 0.05, 0.5, reach, True, False, True, both, precision)
        problem = sinkhorn_problem.Problem(x, y, a, b, *options)
        yield f"sinkhorn forward {name}", lambda a=problem: sinkhorn.sinkhorn(a)
        transport_x, transport_y = (torch.empty(batch, count, n + m, device="meta") for count in (n, m))
        grads = (torch.empty(1, device="meta").expand(batch), None, None)
        transports = (transport_x, transport_y if both else None)
        arguments = sinkhorn_problem.BackwardArguments(*grads, x, y, a, b, *transports, precision)
        yield f"sinkhorn backward {name}", lambda a=arguments: sinkhorn.sinkhorn_backward(a)


def _transport_targets() -> Iterator[tuple[str, Callable[[], object]]]:
    # (B, M, L, C, N): SMTC's pairs at 256² and at 336 x 504, one video, ragged sizes, the limits.
    for shape, dtypes, both, weighted in (
        ((768, 256, 256, 384, 16), (torch.bfloat16, torch.float32), True, False),
        ((768, 256, 256, 384, 16), (torch.bfloat16,), True, True),
        ((96, 864, 864, 384, 16), (torch.bfloat16, torch.float32), True, False),
        ((6, 1500, 1500, 768, 16), (torch.float32,), True, False),
        ((6, 255, 257, 63, 5), (torch.float16,), False, True),
        ((6, 2048, 2048, 384, 64), (torch.bfloat16, torch.float32), True, True),
    ):
        batch, m, length, dim, labels = shape
        for dtype in dtypes:
            x, y = (torch.empty(batch, count, dim, dtype=dtype, device="meta") for count in (m, length))
            y_values, x_values = (torch.empty(batch, count, labels, device="meta") for count in (length, m))
            a, b = (torch.empty(batch, count, device="meta") if weighted else None for count in (m, length))
            name = f"B{batch} M{m} L{length} C{dim} N{labels} {str(dtype).removeprefix('torch.')}"
            name += " both" * both + " weights" * weighted
            arguments = transport_op.Arguments(x, y, y_values, x_values if both else None, a, b, 0.05, 3)
            yield f"transport_targets {name}", lambda a=arguments: transport_targets.transport_targets(a)


def _sinkhorn_plan() -> Iterator[tuple[str, Callable[[], object]]]:
    # (B, N, M): slots of frames, patches of frames, one video, ragged sizes, the limits.
    for shape, dtype, weighted, keep in (
        ((3456, 32, 32), torch.float32, False, True),
        ((64, 64, 100), torch.bfloat16, True, True),
        ((128, 196, 256), torch.float32, False, True),
        ((96, 864, 864), torch.float32, False, True),
        ((96, 864, 864), torch.float32, False, False),
        ((96, 864, 864), torch.bfloat16, True, True),
        ((1, 864, 864), torch.float32, False, True),
        ((6, 257, 255), torch.float16, True, False),
        ((6, 2048, 2048), torch.float32, True, True),
    ):
        batch, n, m = shape
        cost = torch.empty(shape, dtype=dtype, device="meta")
        a, b = (torch.empty(batch, count, dtype=dtype, device="meta") if weighted else None for count in (n, m))
        name = f"B{batch} N{n} M{m} {str(dtype).removeprefix('torch.')}" + " weights" * weighted + " history" * keep
        problem = plan_problem.Problem(cost, a, b, 0.05, 100, None, keep)
        yield f"sinkhorn_plan {name}", lambda p=problem: transport_plan.sinkhorn_plan(p)
