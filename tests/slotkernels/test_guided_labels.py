"""Label maps with a fast guided filter, on every backend, compared with a textbook filter in float64."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slotkernels import LabelMaps, guided_labels, propagate_labels
from slotkernels.guided_labels import bytes_moved, flops, reference
from slotkernels.guided_labels.op import default_radius

from .guided_cases import CASES, FULL_SIZE, arguments_of, assert_close, oracle
from .label_cases import (
    BACKENDS,
    CPP,
    DTYPES,
    ON_GPU,
    assert_exact_statistics,
    make,
    needs_cpp,
    needs_triton,
)


def filtered(image, video, grid, guide, *, radius, epsilon, subsample):
    """The reference's soft masks [B, T, K, H, W]."""
    size = guide.shape[2:4]
    radius = default_radius(grid, size) if radius is None else radius
    scores = (image @ video).mT.flatten(0, 1).unflatten(2, grid)
    colours = guide.flatten(0, 1).permute(0, 3, 1, 2).to(scores.dtype) / 255 - 0.5
    masks = reference.filtered(scores, colours, max(1, round(radius / subsample)), epsilon, subsample)
    return masks.unflatten(0, image.shape[:2])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-6])
def test_filtered_masks_of_the_reference_are_the_textbook_ones(case, epsilon):
    (image, video, grid, guide), settings_of = arguments_of(case, torch.float64)
    expected, tolerance = oracle(image, video, grid, guide, **settings_of, epsilon=epsilon)
    masks = filtered(image, video, grid, guide, **settings_of, epsilon=epsilon)
    torch.testing.assert_close(masks, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(masks.sum(2), torch.ones_like(masks[:, :, 0]), rtol=0, atol=1e-8)  # a partition
    narrow = filtered(image.float(), video.float(), grid, guide, **settings_of, epsilon=epsilon)
    assert (narrow - expected).abs().max() < tolerance


def small(backend):
    """All cases; in Triton's interpreter, which is slow, fewer: half types differ only in how they are loaded."""
    every = [(case, dtype) for case in CASES for dtype in DTYPES]
    if backend != "triton":
        return every
    return [(case, dtype) for case, dtype in every if case[4] < 5 and dtype == torch.float32]


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        pytest.param(backend.values[0], case, dtype, marks=backend.marks, id=f"{backend.id}-{case}-{dtype}")
        for backend in BACKENDS
        for case, dtype in small(backend.id)
    ],
)
def test_equals_the_argmax_of_textbook_masks(backend, case, dtype):
    arguments, settings_of = arguments_of(case, dtype)
    maps = guided_labels(*arguments, **settings_of, confidence=True, statistics=True, backend=backend)
    assert_close(maps, oracle(*arguments, **settings_of))
    alone = guided_labels(*arguments, **settings_of, backend=backend)
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, maps.labels)


@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
@pytest.mark.parametrize(("backend", "device"), [CPP, *ON_GPU])
def test_full_size(backend, device, case):
    arguments, settings_of = arguments_of(case, torch.float32, device)
    maps = guided_labels(*arguments, **settings_of, confidence=True, statistics=case[4] < 50, backend=backend)
    assert_close(maps, oracle(*arguments, **settings_of))
    assert torch.equal(guided_labels(*arguments, **settings_of, backend=backend), maps.labels)


@pytest.mark.parametrize(("backend", "device"), [CPP, pytest.param("reference", "cpu", id="reference")])
@settings(max_examples=60)
@given(st.data())
def test_any_shape(backend, device, data):
    any_shape(backend, data, 12, 40)


@needs_triton
@settings(max_examples=3)
@given(st.data())
def test_any_small_shape_in_triton(data):
    any_shape("triton", data, 4, 12)


def any_shape(backend, data, patches, pixels):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 2**31))  # so that examples do not depend on earlier ones
    grid, size = (draw(1, patches), draw(1, patches)), (draw(1, pixels), draw(1, pixels))
    case = (draw(1, 2), draw(1, 2), grid, draw(1, patches), draw(1, 2 * patches), size, draw(1, 5), draw(0, 30))
    arguments, options = arguments_of(case, data.draw(st.sampled_from(DTYPES)))
    options["clusters"] = torch.randint(-1, case[4], (case[0], case[4])) if data.draw(st.booleans()) else None
    options["epsilon"] = data.draw(st.sampled_from([1e-4, 1e-3, 1.0]))
    maps = guided_labels(*arguments, **options, confidence=True, statistics=True, backend=backend)
    assert_close(maps, oracle(*arguments, **options))


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_clusters_and_dropped_slots(backend, device):
    case = (2, 1, (3, 4), 5, 9, (11, 13), 2, None) if backend != "triton" else (1, 1, (2, 3), 5, 4, (7, 9), 2, 2)
    (image, video, grid, guide), settings_of = arguments_of(case, device=device)
    clusters = torch.randint(-1, 4, (case[0], case[4]), device=device)
    maps = guided_labels(image, video, grid, guide, **settings_of, clusters=clusters, statistics=True, backend=backend)
    assert_close(maps, oracle(image, video, grid, guide, **settings_of, clusters=clusters))
    hidden = video.masked_fill((clusters < 0)[:, None, None], torch.nan)
    again = guided_labels(image, hidden, grid, guide, **settings_of, clusters=clusters, backend=backend)
    assert torch.equal(again, maps.labels)


def half_and_half(device="cpu"):
    """A frame whose colours change at column 15, with two columns of patches that meet at column 12."""
    guide = torch.full((1, 1, 16, 24, 3), 60, dtype=torch.uint8, device=device)
    guide[:, :, :, 15:] = torch.tensor([200, 90, 10], dtype=torch.uint8, device=device)
    attention = torch.eye(2, device=device).expand(1, 1, 2, 2)
    return attention, attention, (1, 2), guide


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_labels_follow_the_edge_of_the_guide(backend, device):
    image, video, grid, guide = half_and_half(device)
    plain = propagate_labels(image, video, grid, (16, 24))
    assert plain.flatten(0, 2).argmax(1).eq(12).all()  # the first pixel of segment 1 in each row
    labels = guided_labels(image, video, grid, guide, radius=8, subsample=1, backend=backend)
    assert torch.equal(labels.flatten(0, 2).argmax(1), torch.full((16,), 15, device=device))


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_flat_frames_smooth_the_masks(backend, device):
    """Without colours to fit, the coefficients are 0 and the offset is a box mean."""
    image, video = make((1, 1, (4, 5), 3, 4, (12, 15)), device=device)
    guide = torch.full((1, 1, 12, 15, 3), 77, dtype=torch.uint8, device=device)
    maps = guided_labels(
        image, video, (4, 5), guide, radius=2, subsample=1, epsilon=1e-6, confidence=True, backend=backend
    )
    scores = (image @ video)[0, 0].T.unflatten(1, (4, 5)).double()
    masks = torch.nn.functional.interpolate(scores[None], (12, 15), mode="bilinear")
    for _ in range(2):
        masks = torch.nn.functional.avg_pool2d(masks, 5, 1, 2, count_include_pad=False)
    best = masks[0].topk(2, 0).values
    torch.testing.assert_close(maps.confidence[0, 0].double(), best[0] - best[1], rtol=2**-10, atol=2e-5)
    clear = best[0] - best[1] > 2e-5
    assert torch.equal(maps.labels[0, 0][clear].long(), masks[0].argmax(0)[clear])


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_ties_go_to_the_lowest_index(backend, device):
    _, _, _, guide = half_and_half(device)
    image, video = torch.ones(1, 1, 6, 1, device=device), torch.full((1, 1, 1, 6), 1 / 8, device=device)
    for lowest in (0, 1, 5):
        video[..., :lowest] = 0
        maps = guided_labels(image, video, (2, 3), guide, radius=6, confidence=True, backend=backend)
        assert (maps.labels == lowest).all()
        torch.testing.assert_close(maps.confidence, torch.full_like(maps.confidence, 0 if lowest < 5 else 1 / 8))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_a_segment_that_is_not_finite_wins_the_frame(backend, device, special):
    case = (1, 2, (2, 3), 4, 3, (5, 7), 2, 2)
    (image, video, grid, guide), settings_of = arguments_of(case, device=device)
    expected = guided_labels(image, video, grid, guide, **settings_of, backend=backend)
    video[0, 1, 3, 2] = video[0, 1, 0, 1] = special
    maps = guided_labels(image, video, grid, guide, **settings_of, confidence=True, statistics=True, backend=backend)
    assert (maps.labels[0, 1] == 1).all()
    assert torch.equal(maps.labels[0, 0], expected[0, 0])  # other frames keep their labels
    assert torch.equal(maps.confidence.isnan().flatten(2).all(2), torch.tensor([[False, True]], device=device))
    assert_exact_statistics(maps)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_strided_mixed_and_empty_input(backend, device):
    case = (2, 2, (3, 4), 5, 3, (7, 9), 2, None) if backend != "triton" else (1, 2, (2, 3), 3, 2, (4, 5), 2, None)
    (image, video, grid, guide), _ = arguments_of(case, device=device)
    image, video = image.bfloat16(), video.half()
    expected = guided_labels(image, video, grid, guide, subsample=2, confidence=True, backend=backend)
    planar = guide.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    layouts = [
        (image.mT.contiguous().mT, video.mT.contiguous().mT, planar),
        (
            image.transpose(0, 2).contiguous().transpose(0, 2),
            video,
            torch.cat((guide, guide), 3).narrow(3, 0, case[5][1]),
        ),
        (
            image.float(),
            video.double() if backend == "reference" else video.float(),
            guide.flip(3).contiguous().flip(3),
        ),
    ]
    for one, other, frames in layouts:
        assert torch.equal(frames, guide)
        again = guided_labels(one, other, grid, frames, subsample=2, confidence=True, backend=backend)
        assert (again.labels != expected.labels)[expected.confidence > 1e-4].sum() == 0
        torch.testing.assert_close(again.confidence, expected.confidence, rtol=2**-10, atol=1e-4)
    for batch, frames in ((0, 2), (case[0], 0)):
        part = (slice(batch), slice(frames))
        empty = guided_labels(
            image[part], video[part], grid, guide[part], confidence=True, statistics=True, backend=backend
        )
        assert [t.shape[:2] for t in empty] == [(batch, frames)] * 4


@needs_cpp
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_threads_and_calls_give_the_same_bits(frames):
    """One thread takes all frames; several share frames, or the bands of rows of one."""
    arguments, _ = arguments_of((1, frames, (24, 36), 32, 8, (336, 504), 4, None))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(guided_labels(*arguments, confidence=True, statistics=True, backend="cpp"))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


LEVEL = """
import sys
import torch
from slotkernels import guided_labels
torch.set_num_threads(1)
extras = {"confidence": True, "statistics": True, "backend": "cpp"}
videos = [guided_labels(*arguments, **options, **extras) for arguments, options in torch.load(sys.argv[1])]
torch.save([tuple(maps) for maps in videos], sys.argv[2])
"""


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level, tmp_path):
    """All other tests run the best level that this CPU has."""
    calls = [arguments_of(case, dtype) for case, dtype in zip(CASES, 3 * DTYPES, strict=False)]
    calls.append(arguments_of(FULL_SIZE[2]))
    torch.save(calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", LEVEL, str(tmp_path / "calls.pt"), str(tmp_path / "maps.pt")]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)
    for (arguments, options), maps in zip(calls, torch.load(tmp_path / "maps.pt"), strict=True):
        assert_close(LabelMaps(*maps), oracle(*arguments, **options))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_frames_are_filtered_in_groups(backend, monkeypatch):
    case = (2, 3, (2, 3), 4, 3, (9, 11), 2, None) if backend == "reference" else (1, 3, (2, 3), 4, 3, (5, 6), 2, None)
    arguments, options = arguments_of(case)
    extras = {**options, "confidence": True, "statistics": True, "backend": backend}
    expected = guided_labels(*arguments, **extras)
    groups = []
    if backend == "reference":
        function = reference.filtered
        monkeypatch.setattr(reference, "filtered", lambda s, *a: groups.append(len(s)) or function(s, *a))
        monkeypatch.setattr("slotkernels.propagation.reference.CHUNK_BYTES", 2 * 3 * 9 * 11 * 4)
    else:
        triton = importlib.import_module("slotkernels.guided_labels.triton")
        function = triton.launch
        monkeypatch.setattr(
            triton, "launch", lambda k, grid, *a, **c: groups.append(grid[-1]) or function(k, grid, *a, **c)
        )
        monkeypatch.setattr(triton, "GROUP_BYTES", 2 * 21 * 9 * 4)
    maps = guided_labels(*arguments, **extras)
    assert groups == ([2, 2, 2] if backend == "reference" else [2] * 7 + [1] * 7)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))


@needs_cpp
def test_memory_does_not_grow_with_the_video():
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        pytest.skip("peak memory can be reset and read on Linux only")

    def peak(frames):
        """MB beyond the result; both attention maps are fp16, so that a copy of them in fp32 would show."""
        image, video = torch.rand(1, frames, 96, 32).half(), torch.rand(1, frames, 32, 8).half()
        guide = torch.randint(0, 256, (1, frames, 3, 40, 60), dtype=torch.uint8).permute(0, 1, 3, 4, 2)
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
        refs.write_text("5")  # resets the peak
        maps = guided_labels(image, video, (8, 12), guide, statistics=True)
        after = int(status.read_text().split("VmHWM:")[1].split()[0])
        return (after - before) / 1024 - sum(t.nbytes for t in maps if t is not None) / 2**20

    peak(100)
    assert peak(3000) < 3  # a copy of the guide would be 21 MB


@pytest.mark.gpu
def test_memory_on_a_gpu_does_not_grow_with_the_video():
    extra = []
    for frames in (60, 600):
        image, video = torch.rand(1, frames, 864, 32).cuda().half(), torch.rand(1, frames, 32, 8).cuda().half()
        guide = torch.randint(0, 256, (1, frames, 3, 336, 504), dtype=torch.uint8).cuda().permute(0, 1, 3, 4, 2)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        labels = guided_labels(image, video, (24, 36), guide, backend="triton")
        extra.append(torch.cuda.max_memory_allocated() - before - labels.nbytes)
    assert extra[1] < extra[0] + (8 << 20)


def test_opcheck_and_fullgraph():
    (image, video, grid, guide), _ = arguments_of((2, 2, (3, 4), 5, 3, (7, 9), 2, None))
    clusters = torch.randint(-1, 3, (2, 3))
    op = torch.ops.slotkernels.guided_labels
    for extras in ((False, False), (True, True)):
        torch.library.opcheck(op, (image, video, clusters, guide, *grid, 2, 1e-4, 2, *extras, "auto"))

    def everything(image, video):
        return guided_labels(image, video, grid, guide, confidence=True, statistics=True)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(image, video)
    assert all(torch.equal(one, other) for one, other in zip(compiled, everything(image, video), strict=True))


def test_gradients_are_refused():
    (image, video, grid, guide), _ = arguments_of(CASES[0])
    image.requires_grad_()
    assert not guided_labels(image, video, grid, guide, confidence=True).confidence.requires_grad
    with pytest.raises(RuntimeError, match=r"guided_labels: .*detach the attention"):
        torch.func.grad(lambda v: guided_labels(image, v, grid, guide, confidence=True).confidence.sum())(video)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide": torch.zeros(2, 2, 7, 9, 3)}, r"guide is float32 \[2, 2, 7, 9, 3\], expected dtype uint8"),
        ({"guide": torch.zeros(2, 2, 7, 9, 4, dtype=torch.uint8)}, r"guide is uint8 \[2, 2, 7, 9, 4\], expected"),
        ({"guide": torch.zeros(2, 1, 7, 9, 3, dtype=torch.uint8)}, "T = 2"),
        ({"guide": torch.zeros(2, 2, 0, 9, 3, dtype=torch.uint8)}, "H > 0"),
        ({"grid": (3, 5)}, r"grid=\(3, 5\), expected h \* w = 12"),
        ({"radius": -1}, "radius=-1, expected 0 or more"),
        ({"epsilon": 1e-9}, "epsilon=1e-09, expected 1e-08 or more"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"subsample": 0}, "subsample=0, expected at least 1"),
        ({"video_attention": torch.zeros(2, 2, 5, 256)}, "expected K <= 255"),
        ({"clusters": torch.zeros(2, 4, dtype=torch.int64)}, "K = 3"),
    ],
)
def test_bad_input_is_an_error_that_names_it(changes, message):
    (image, video, grid, guide), _ = arguments_of((2, 2, (3, 4), 5, 3, (7, 9), 2, None))
    arguments = {"image_attention": image, "video_attention": video, "grid": grid, "guide": guide}
    with pytest.raises(ValueError, match=f"^guided_labels: .*{message}"):
        guided_labels(**arguments | changes)


@needs_triton
def test_a_backend_that_cannot_serve_a_call_says_why():
    (image, video, grid, guide), _ = arguments_of(CASES[0], torch.float64)
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot serve this call: float64"):
            guided_labels(image, video, grid, guide, backend=backend)
    with pytest.raises(RuntimeError, match="more than 16384 patches or pixels a side"):
        guided_labels(image.float(), video.float(), grid, guide, subsample=20000, backend="triton")


def test_cost_formulas():
    # attention 4 * 2 * 3 * (5 * 2 + 2 * 7), guide 3 * 6 * 100, labels 6 * 100
    assert bytes_moved(2, 3, 5, 2, 7, 100) == 4 * 6 * 2 * (5 + 7) + 6 * 3 * 100 + 6 * 100
    assert flops(2, 3, 5, 2, 7, 100, 10) == 6 * 7 * (2 * 5 * 2 + 64 * 10 + 15 * 100)
