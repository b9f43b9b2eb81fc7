"""Label maps, their confidence and their statistics on every backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slotkernels import LabelMaps, propagate_attention, propagate_labels
from slotkernels.propagation import reference

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

# B, T, (h, w), N, K, (H, W): odd sizes; one patch; more objects than a vector has lanes; most objects; fewer pixels
# than patches; cells of more than 16 rows and columns; one row of pixels.
CASES = [
    (2, 2, (4, 6), 5, 3, (17, 23)),
    (1, 1, (1, 1), 1, 1, (3, 5)),
    (1, 2, (1, 7), 33, 20, (6, 30)),
    (2, 1, (3, 2), 3, 255, (3, 2)),
    (1, 2, (6, 6), 4, 8, (3, 2)),
    (1, 1, (3, 2), 17, 9, (50, 70)),
    (1, 1, (2, 19), 4, 4, (1, 41)),
]
FULL_SIZE = [
    (2, 5, (24, 36), 32, 8, (336, 504)),
    (1, 2, (24, 24), 32, 20, (336, 336)),
    (1, 1, (24, 36), 33, 255, (217, 305)),
    (1, 2, (24, 36), 32, 8, (720, 1280)),
    (2, 1, (37, 53), 11, 17, (30, 40)),
    (1, 1, (5, 300), 7, 3, (211, 301)),
    (1, 1, (60, 80), 16, 33, (61, 79)),
]


def oracle(image, video, grid, size, clusters=None):
    """Float64 soft masks [B, T, K, H, W], all at once."""
    product = image.double() @ video.double()
    if clusters is not None:
        product = product @ F.one_hot(clusters + 1, clusters.shape[1] + 1)[:, None, :, 1:].double()
    masks = F.interpolate(product.mT.flatten(0, 1).unflatten(2, grid), size, mode="bilinear", align_corners=False)
    return masks.unflatten(0, image.shape[:2])


def assert_exact(maps, image, video, grid, size, clusters=None):
    """Labels, confidence, areas and boxes against the oracle."""
    masks = oracle(image, video, grid, size, clusters)
    slots, objects = image.shape[3], video.shape[3]
    assert maps.labels.dtype == torch.uint8
    assert maps.labels.shape == (*image.shape[:2], *size)
    winner = maps.labels.long().unsqueeze(2)
    best = masks.amax(2)
    # As the docstring says: N products in fp32 that sum to 1 at most, positions in fp32 (the reference's), 8 roundings.
    bound = (slots + 2 * sum(grid) + 16) * 1.2e-7
    assert (best - masks.gather(2, winner).squeeze(2)).max() <= bound
    rest = masks.scatter(2, winner, -1).amax(2) if objects > 1 else torch.zeros_like(best)
    assert (maps.labels != masks.argmax(2))[best - rest > bound].sum() == 0
    if maps.confidence is not None:
        assert maps.confidence.dtype == torch.float16
        # Half a unit in the last place of fp16; subnormal below 6e-5.
        torch.testing.assert_close(maps.confidence.double(), best - rest, rtol=2**-11, atol=bound + 2**-25)
    if maps.areas is not None:
        assert_exact_statistics(maps)


def small(backend):
    """All cases; in Triton's interpreter, which is slow, fewer: half types differ only in how they are loaded."""
    every = [(case, dtype) for case in CASES for dtype in DTYPES]
    if backend != "triton":
        return every
    return [(case, dtype) for case, dtype in every if case[4] < 255 and (dtype == torch.float32 or case == CASES[1])]


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        pytest.param(backend.values[0], case, dtype, marks=backend.marks, id=f"{backend.id}-{case}-{dtype}")
        for backend in BACKENDS
        for case, dtype in small(backend.id)
    ],
)
def test_equals_product_interpolation_argmax(backend, case, dtype):
    *_, grid, _, _, size = case
    image, video = make(case, dtype)
    maps = propagate_labels(image, video, grid, size, confidence=True, statistics=True, backend=backend)
    assert_exact(maps, image, video, grid, size)
    alone = propagate_labels(image, video, grid, size, backend=backend)
    assert isinstance(alone, torch.Tensor)
    assert torch.equal(alone, maps.labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL_SIZE, ids=str)
@pytest.mark.parametrize(("backend", "device"), [CPP, *ON_GPU])
def test_full_size(backend, device, case, dtype):
    *_, grid, _, objects, size = case
    image, video = make(case, dtype, device)
    maps = propagate_labels(image, video, grid, size, confidence=True, statistics=objects < 50, backend=backend)
    assert_exact(maps, image, video, grid, size)
    assert torch.equal(propagate_labels(image, video, grid, size, backend=backend), maps.labels)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_clusters(backend, device):
    case = (2, 2, (3, 4), 5, 20, (7, 9)) if backend != "triton" else (2, 1, (2, 3), 5, 9, (7, 9))
    grid, size = case[2], case[5]
    image, video = make(case, device=device)
    clusters, extras = torch.randint(-1, 6, (2, case[4]), device=device), {"confidence": True, "statistics": True}
    maps = propagate_labels(image, video, grid, size, clusters=clusters, **extras, backend=backend)
    assert_exact(maps, image, video, grid, size, clusters)
    assert maps.labels.max() <= 5
    # Clusters that are out of range drop a slot like -1.
    outside = torch.where(clusters < 0, clusters + case[4] + 1, clusters)
    assert torch.equal(propagate_labels(image, video, grid, size, clusters=outside, backend=backend), maps.labels)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_ties_go_to_the_lowest_index(backend, device):
    # Powers of two throughout: F.interpolate may round equal scores of two objects differently.
    image, video = torch.ones(1, 1, 6, 1, device=device), torch.full((1, 1, 1, 18), 1 / 16, device=device)
    for lowest in (0, 1, 17):
        video[..., :lowest] = 0
        maps = propagate_labels(image, video, (2, 3), (8, 12), confidence=True, backend=backend)
        assert (maps.labels == lowest).all()
        assert (maps.confidence == (0 if lowest < 17 else 1 / 16)).all()


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_nan_counts_as_the_largest_score(backend, device):
    image, video = make((1, 2, (3, 4), 5, 9, (10, 13)), device=device)
    image[0, 0, 6, 2] = float("nan")  # every object at one patch
    video[0, 1, 3, 8] = video[0, 1, 0, 5] = float("nan")  # two objects everywhere
    maps = propagate_labels(image, video, (3, 4), (10, 13), confidence=True, statistics=True, backend=backend)
    masks = oracle(image, video, (3, 4), (10, 13))
    lost = (image.double() @ video.double()).isnan().double()
    share = oracle(lost, torch.eye(9, device=device).expand(1, 2, 9, 9), (3, 4), (10, 13)).amax(2)
    # Where a NaN patch has a share of exactly 0, at a patch centre or beyond the outermost, it may count or not.
    for certain, where in ((True, share > 0), (False, ~masks.isnan().any(2))):
        assert where.any()
        assert (maps.confidence[where].isnan() == certain).all()
        assert torch.equal(maps.labels[where].long(), masks.argmax(2)[where])
    assert (maps.labels[0, 1] == 5).all()
    assert_exact_statistics(maps)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_infinite_scores_give_labels_in_range(backend, device):
    image, video = make((1, 1, (3, 4), 5, 3, (10, 13)), device=device)
    image[0, 0, 6, 2] = float("inf")
    video[0, 0, 3, 1] = float("-inf")
    maps = propagate_labels(image, video, (3, 4), (10, 13), statistics=True, backend=backend)
    assert maps.labels.max() < 3
    assert_exact_statistics(maps)
    again = propagate_labels(image, video, (3, 4), (10, 13), backend=backend)
    assert torch.equal(again, maps.labels)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_scores_need_not_be_probabilities(backend, device):
    image = torch.randn(1, 2, 12, 5, device=device)
    video = torch.randn(1, 2, 5, 4, device=device) - 3  # negative scores too, and nothing sums to 1
    masks = oracle(image, video, (3, 4), (10, 13))
    labels = propagate_labels(image, video, (3, 4), (10, 13), backend=backend)
    best = masks.topk(2, 2).values
    clear = best[:, :, 0] - best[:, :, 1] > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear].long(), masks.argmax(2)[clear])


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, *ON_GPU])
def test_strided_mixed_and_empty_input(backend, device):
    case = (2, 2, (3, 4), 5, 3, (7, 9))
    image, video = make(case, device=device)
    image, video = image.bfloat16(), video.half()
    expected = propagate_labels(image, video, (3, 4), (7, 9), confidence=True, backend=backend)
    assert_exact(expected, image.double(), video.double(), (3, 4), (7, 9))
    layouts = [
        (image.transpose(2, 3).contiguous().transpose(2, 3), video.mT.contiguous().mT),
        (image.transpose(0, 2).contiguous().transpose(0, 2), video.transpose(0, 3).contiguous().transpose(0, 3)),
        (torch.stack((image, image + 1), -1)[..., 0], torch.cat((video, video), 3)[..., :3]),
        (image.float(), video.double() if backend == "reference" else video.float()),
    ]
    for one, other in layouts:
        assert torch.equal(one.double(), image.double())
        again = propagate_labels(one, other, (3, 4), (7, 9), confidence=True, backend=backend)
        assert torch.equal(again.labels, expected.labels)
        torch.testing.assert_close(again.confidence, expected.confidence, rtol=2**-10, atol=1e-6)
    for batch, frames in ((0, 2), (2, 0)):
        empty = propagate_labels(
            image[:batch, :frames], video[:batch, :frames], (3, 4), (7, 9),
            confidence=True, statistics=True, backend=backend,
        )  # fmt: skip
        assert [t.shape[:2] for t in empty] == [(batch, frames)] * 4


@pytest.mark.parametrize(("backend", "device"), [CPP, pytest.param("reference", "cpu", id="reference")])
@settings(max_examples=150)
@given(st.data())
def test_any_shape(backend, device, data):
    any_shape(backend, data, 20, 70)


@needs_triton
@settings(max_examples=8)
@given(st.data())
def test_any_small_shape_in_triton(data):
    any_shape("triton", data, 4, 12)


def any_shape(backend, data, patches, pixels):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 2**31))  # so that examples do not depend on earlier ones
    grid, size = (draw(1, patches), draw(1, patches)), (draw(1, pixels), draw(1, pixels))
    case = (draw(1, 2), draw(1, 2), grid, draw(1, patches), draw(1, 2 * patches), size)
    image, video = make(case, data.draw(st.sampled_from(DTYPES)), contrast=data.draw(st.sampled_from([0.1, 2.0, 20.0])))
    clusters = torch.randint(-1, case[4], (case[0], case[4])) if data.draw(st.booleans()) else None
    confidence, statistics = data.draw(st.booleans()), data.draw(st.booleans())
    maps = propagate_labels(
        image, video, grid, size, clusters=clusters, confidence=confidence, statistics=statistics, backend=backend
    )
    if not confidence and not statistics:
        maps = LabelMaps(maps, None, None, None)
    assert (maps.confidence is None, maps.areas is None, maps.boxes is None) == (
        not confidence, not statistics, not statistics,
    )  # fmt: skip
    assert_exact(maps, image, video, grid, size, clusters)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_patch_resolution_is_argmax_of_propagated_attention(backend, device):
    image, video = make(CASES[0], device=device)
    labels = propagate_labels(image, video, (4, 6), backend=backend)
    assert torch.equal(labels.flatten(2).long(), propagate_attention(image, video).argmax(-1))


@needs_cpp
def test_threads_and_calls_give_the_same_bits():
    image, video = make((1, 7, (24, 36), 32, 8, (336, 504)))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(propagate_labels(image, video, (24, 36), (336, 504), confidence=True, statistics=True))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


LEVEL = """
import sys
import torch
from slotkernels import propagate_labels
torch.set_num_threads(1)
videos = [propagate_labels(*call, confidence=True, statistics=True, backend="cpp") for call in torch.load(sys.argv[1])]
torch.save([tuple(maps) for maps in videos], sys.argv[2])
"""


@needs_cpp
@pytest.mark.parametrize("level", ["avx2", "default"])
def test_every_level_of_the_cpu(level, tmp_path):
    """All other tests run the best level that this CPU has."""
    cases = [*zip(CASES, 3 * DTYPES, strict=False), (FULL_SIZE[1], torch.float16), (FULL_SIZE[6], torch.bfloat16)]
    calls = [(*make(case, dtype), case[2], case[5]) for case, dtype in cases]
    torch.save(calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", LEVEL, str(tmp_path / "calls.pt"), str(tmp_path / "maps.pt")]
    subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": level}, check=True)
    for call, maps in zip(calls, torch.load(tmp_path / "maps.pt"), strict=True):
        assert_exact(LabelMaps(*maps), *call)


def test_grouping_of_frames_does_not_change_the_reference(monkeypatch):
    case = (2, 5, (4, 6), 5, 3, (17, 23))
    image, video = make(case)
    options = {"confidence": True, "statistics": True, "backend": "reference"}
    expected = propagate_labels(image, video, (4, 6), (17, 23), **options)
    one_frame = 3 * 17 * 23 * 4
    for limit in (1, 3 * one_frame):
        monkeypatch.setattr(reference, "CHUNK_BYTES", limit)
        maps = propagate_labels(image, video, (4, 6), (17, 23), **options)
        assert all(torch.equal(one, other) for one, other in zip(maps, expected, strict=True))


def test_soft_masks_never_exist_together(monkeypatch):
    image, video = make((1, 6, (4, 4), 5, 3, (8, 8)))
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2 * 3 * 8 * 8 * 4)
    frames = []
    interpolate = F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda masks, *a, **k: frames.append(len(masks)) or interpolate(masks, *a, **k)
    )
    propagate_labels(image, video, (4, 4), (8, 8), backend="reference")
    assert frames == [2, 2, 2]


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_memory_does_not_grow_with_the_video(layout):
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        pytest.skip("peak memory can be reset and read on Linux only")

    def peak(frames):
        """MB beyond the result; both attention maps are fp16, so that a copy of them in fp32 would show."""
        image, video = torch.rand(1, frames, 96, 32).half(), torch.rand(1, frames, 32, 8).half()
        if layout == "transposed":
            image = image.mT.contiguous().mT
        before = int(status.read_text().split("VmRSS:")[1].split()[0])
        refs.write_text("5")  # resets the peak
        maps = propagate_labels(image, video, (8, 12), (80, 120), statistics=True)
        after = int(status.read_text().split("VmHWM:")[1].split()[0])
        return (after - before) / 1024 - sum(t.nbytes for t in maps if t is not None) / 2**20

    peak(100)
    assert peak(4000) < 3  # a copy of the image attention would be 23 MB in fp16, soft masks 1.2 GB


@pytest.mark.gpu
def test_memory_on_a_gpu_does_not_grow_with_the_video():
    extra = []
    for frames in (30, 3000):
        image, video = torch.rand(1, frames, 864, 32).cuda().half(), torch.rand(1, frames, 32, 8).cuda().half()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        labels = propagate_labels(image, video, (24, 36), (336, 504), backend="triton")
        extra.append(torch.cuda.max_memory_allocated() - before - labels.nbytes)
    assert max(extra) < 1 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("extras", [False, True])
def test_a_captured_graph_replays_on_new_inputs(extras):
    image, video = make(FULL_SIZE[0], torch.float16, "cuda")
    clusters = torch.randint(-1, 5, (2, 8), device="cuda")

    def step():
        maps = propagate_labels(
            image,
            video,
            (24, 36),
            (336, 504),
            clusters=clusters,
            confidence=extras,
            statistics=extras,
            backend="triton",
        )
        return maps if extras else (maps,)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    image.copy_(make(FULL_SIZE[0], torch.float16, "cuda")[0])
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


@needs_triton
def test_a_backend_that_cannot_serve_a_call_says_why():
    image, video = torch.zeros(1, 1, 2, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for backend in ("cpp", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot serve this call: float64"):
            propagate_labels(image, video, (1, 2), backend=backend)
    with pytest.raises(RuntimeError, match="more than 16384 patches or pixels a side"):
        propagate_labels(image.float(), video.float(), (1, 2), (1, 20000), backend="triton")
    assert (propagate_labels(image, video, (1, 2), (1, 20000)) == 0).all()
