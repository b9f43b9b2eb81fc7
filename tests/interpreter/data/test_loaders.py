import gc
import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from interpreter.data import VideoError, open_video
from interpreter.data import loaders as loaders_module
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Loader, LoaderError, choose_loader, dali_obstacle, open_loader
from interpreter.data.loaders.base import split
from interpreter.data.loaders.pool import _Memory
from interpreter.data.video.file import VideoFile

SIZE = (48, 80)
CPU = torch.device("cpu")
HAS_DALI = loaders_module._dali_installed()
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="needs nvidia-dali-cuda120 or -cuda130")
ENGINES = ["pyav", "torch", pytest.param("dali", marks=needs_dali)]


def write_folder(folder, frames, suffix, **options):
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{t}{suffix}", **options)
    return folder


@pytest.fixture
def paths(tmp_path, moving, encode):
    """Videos that all engines decode, of several sizes and lengths."""
    return [
        encode(tmp_path / "vp9.webm", moving(31, 120, 160), "libvpx-vp9", g=12),
        write_folder(tmp_path / "jpeg", moving(7, 60, 100, seed=1), ".jpg", quality=90),
        encode(tmp_path / "mjpeg.avi", moving(12, 96, 128, seed=2), "mjpeg", "yuvj420p"),
        write_folder(tmp_path / "png", moving(3, *SIZE, seed=3), ".png"),
    ]


@pytest.fixture
def videos(paths):
    return [open_video(path) for path in paths]


def requests(videos, count=6, size=20, seed=0):
    """Requests of frames of all videos in any order, some of them twice."""
    rng = np.random.default_rng(seed)
    total = sum(video.num_frames for video in videos)
    draws = ((rng.integers(0, total, size), rng.random(size) < 0.5) for _ in range(count))
    return [(torch.from_numpy(frames), torch.from_numpy(flips)) for frames, flips in draws]


def truth(videos, request):
    """What `Video.read` gives for a request."""
    everything = np.concatenate([video.read(range(video.num_frames), SIZE) for video in videos])
    frames, flips = (part.numpy() for part in request)
    return np.where(flips[:, None, None, None], everything[frames, :, ::-1], everything[frames])


def whole(videos):
    """A request of all frames in order."""
    total = sum(video.num_frames for video in videos)
    return torch.arange(total), torch.zeros(total, dtype=torch.bool)


def children():
    return [" ".join(c.cmdline()) for c in psutil.Process().children()]


@pytest.mark.parametrize("engine", ["pyav", "torch"])
def test_pixels_are_those_of_video_read(engine, videos):
    with open_loader(engine, videos, SIZE, CPU, workers=2) as loader:
        for request in requests(videos):
            found = loader.batch(*request)
            assert found.dtype == torch.uint8
            assert np.array_equal(found, truth(videos, request))


@needs_dali
def test_dali_gives_the_same_frames_within_a_rounding(videos):
    all_frames = truth(videos, whole(videos)).astype(float)
    starts = np.cumsum([0] + [video.num_frames for video in videos])
    with open_loader("dali", videos, SIZE, CPU, workers=2) as loader:
        found = loader.batch(*whole(videos)).numpy()
        for index, (start, end) in enumerate(itertools.pairwise(starts)):
            apart = np.abs(found[start:end, None] - all_frames[None, start:end])
            difference = apart.mean((2, 3, 4))
            assert np.array_equal(difference.argmin(1), np.arange(end - start))  # no frame but the one asked for
            if videos[index].path.is_dir():  # native pixels are equal, the resize rounds otherwise
                assert max(apart[t, t].max() for t in range(end - start)) <= 1
            else:  # chroma is interpolated otherwise before the resize, which shows at these hard edges
                assert difference.diagonal().max() < 2
        for request in requests(videos):
            assert np.abs(loader.batch(*request).numpy() - truth(videos, request).astype(float)).mean() < 2


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mjpeg"])
@needs_dali
def test_dali_agrees_on_real_pictures(codec, real_clips, tmp_path, encode):
    frames = open_video(real_clips["carphone_pristine"]).read(range(0, 60, 3))
    path = encode(tmp_path / "clip.mkv", frames, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    folder = write_folder(tmp_path / "frames", frames, ".jpg", quality=92)
    for video, largest in ((open_video(path), 16), (open_video(folder), 1)):
        with open_loader("dali", [video], SIZE, CPU, workers=2) as loader:
            apart = np.abs(loader.batch(*whole([video])).numpy() - truth([video], whole([video])).astype(float))
        assert apart[:, 1:-1, 1:-1].max() <= largest
        assert apart.max() <= 16  # at the border, the filter reaches over the edge
        assert apart.mean() < 0.5


@pytest.mark.parametrize("engine", ["pyav", "torch"])
def test_real_clips_are_decoded_exactly(engine, real_clips):
    videos = [open_video(real_clips[name]) for name in ("carphone_pristine", "bikes")]
    last = sum(video.num_frames for video in videos) - 1
    request = torch.tensor([last, 0, 5, 6, 7, 100, last - 1]), torch.tensor([True] + 6 * [False])
    with open_loader(engine, videos, SIZE, CPU, workers=2) as loader:
        assert np.array_equal(loader.batch(*request), truth(videos, request))


@pytest.mark.parametrize("engine", ENGINES)
def test_clips_of_the_shared_data_are_decoded(engine, shared_data):
    if not os.environ.get("INTERPRETER_DATA"):
        pytest.skip("set INTERPRETER_DATA to the folder that holds davis/")
    videos = [open_video(path) for path in sorted((shared_data / "davis" / "JPEGImages" / "480p").iterdir())[:2]]
    if engine != "dali":  # MPEG-4 and H.264
        videos += [open_video(shared_data / "videos" / name) for name in ("opencv_Megamind.avi", "sam2_bedroom.mp4")]
    (request,) = requests(videos, 1)
    with open_loader(engine, videos, SIZE, CPU, workers=2) as loader:
        apart = np.abs(loader.batch(*request).numpy() - truth(videos, request).astype(float))
    assert apart[:, 1:-1, 1:-1].max() <= (1 if engine == "dali" else 0)
    assert apart.mean() < 0.5


@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_depend_on_the_request_alone(engine, videos):
    asked = requests(videos, 5)
    with open_loader(engine, videos, SIZE, CPU, workers=1, ahead=0) as loader:
        expected = [loader.batch(*request) for request in asked]
    for workers, ahead in ((1, 3), (2, 2), (3, 1)):
        with open_loader(engine, videos, SIZE, CPU, workers=workers, ahead=ahead) as loader:
            backwards = loader.batches(reversed(asked))
            assert torch.equal(next(backwards), expected[4])  # stays open while another iterator runs
            for pixels, right in zip(loader.batches(asked), expected, strict=True):
                assert torch.equal(pixels, right)
            assert torch.equal(next(backwards), expected[3])


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_together_get_what_one_process_gets(engine, videos):
    (request,) = requests(videos, 1)
    with open_loader(engine, videos, SIZE, CPU, workers=2) as loader:
        expected = loader.batch(*request)
    parts = []
    for rank in range(2):
        with open_loader(engine, videos, SIZE, CPU, workers=1) as loader:
            parts.append(loader.batch(*(part[rank::2] for part in request)))
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_more_requests_are_taken_than_are_loaded_ahead(engine, videos):
    asked, taken = requests(videos, 6), []
    with open_loader(engine, videos, SIZE, CPU, workers=2, ahead=2) as loader:
        batches = loader.batches(taken.append(request) or request for request in asked)
        assert not taken
        for step, _ in enumerate(batches):
            assert len(taken) == min(step + 3, 6)


def test_closing_the_iterator_cancels_what_is_loading(videos):
    class Unfinished:
        def __init__(self, request):
            self.request, self.cancelled = request, False

        def result(self):
            return self.request[0]

        def cancel(self):
            self.cancelled = True

    class Recorder(Loader):
        def _start(self, request):
            started.append(Unfinished(request))
            return started[-1]

    for closed in ("iterator", "loader"):
        started = []
        loader = Recorder(videos, SIZE, CPU, ahead=2)
        batches = loader.batches(requests(videos, 6))
        next(batches)
        (batches if closed == "iterator" else loader).close()
        assert [one.cancelled for one in started] == [False, True, True]


@pytest.mark.parametrize("engine", ENGINES)
def test_frames_out_of_range_are_refused(engine, videos):
    with open_loader(engine, videos, SIZE, CPU, workers=1) as loader:
        for number in (-1, 53):
            with pytest.raises(IndexError, match=r"there are 53"):
                loader.batch(torch.tensor([0, number]), torch.tensor([False, False]))
        assert len(loader.batch(torch.tensor([52]), torch.tensor([False]))) == 1


def test_pieces_are_of_one_video_and_one_flip_and_cover_the_request():
    index = FrameIndex([4, 6, 30])
    frames = torch.tensor([12, 3, 0, 9, 12, 39, 5, 13, 14])
    flips = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 0]).bool()
    pieces = split((frames, flips), index, longest=3)
    assert sorted(np.concatenate([piece.rows for piece in pieces])) == list(range(9))
    for piece in pieces:
        assert len(piece.rows) <= 3
        assert np.array_equal(index.starts[piece.video] + piece.frames, frames[piece.rows])
        assert (flips[piece.rows] == piece.flip).all()
        assert (np.diff(piece.frames) >= 0).all()
    videos, mirrored, lengths = zip(*((p.video, p.flip, len(p.rows)) for p in pieces), strict=True)
    assert videos == (0, 1, 2, 2, 2)
    assert mirrored == (True, False, False, False, True)
    assert lengths == (2, 2, 3, 1, 1)


@pytest.mark.parametrize("damage", ["jpeg", "video", "gone"])
@pytest.mark.parametrize("engine", ENGINES)
def test_damage_after_the_check_is_one_error_that_names_the_file(engine, damage, paths, videos, cut):
    path = {"jpeg": paths[1] / "4.jpg", "video": paths[0], "gone": paths[1] / "4.jpg"}[damage]
    loader = None if engine == "torch" else open_loader(engine, videos, SIZE, CPU, workers=2)
    if damage == "gone":
        path.unlink()
    else:
        cut(path, 0.3)
    with pytest.raises((VideoError, OSError, LoaderError), match=path.name) as caught:  # noqa: PT012
        loader = loader or open_loader(engine, videos, SIZE, CPU, workers=2)
        loader.batch(*whole(videos))
    assert "\n" not in str(caught.value)
    if damage != "gone":
        assert isinstance(caught.value, VideoError)
    if loader:  # goes on with what is whole
        last = torch.tensor([52]), torch.tensor([False])
        assert np.abs(loader.batch(*last).numpy() - videos[3].read([2], SIZE).astype(float)).max() <= 1
        loader.close()
    assert not children()


def test_a_killed_process_is_one_error_and_no_hang(videos):
    with open_loader("pyav", videos, SIZE, CPU, workers=2) as loader:
        loader.batch(*whole(videos))
        victim, survivor = loader._processes
        os.kill(victim.process.pid, signal.SIGKILL)
        for _ in range(4):
            with pytest.raises(LoaderError, match=r"was killed by signal 9 while it read .*--workers"):
                loader.batch(*whole(videos))
        assert survivor.process.poll() is None
    assert not children()


def test_closing_in_the_middle_leaves_no_process_and_no_memory(videos):
    maps = Path("/proc/self/maps")
    loader = open_loader("pyav", videos, SIZE, CPU, workers=2, ahead=3)
    batches = loader.batches(requests(videos, 5, 200))
    next(batches)
    assert len(children()) == 2
    assert not maps.exists() or "memfd:interpreter-loader" in maps.read_text()
    loader.close()
    del loader, batches
    assert not children()
    gc.collect()
    assert not maps.exists() or "memfd:interpreter-loader" not in maps.read_text()


def test_shared_memory_is_used_again_but_never_while_a_process_may_write_to_it(videos):
    memory = _Memory(CPU)
    first = memory.take(5000)
    job = Future()
    first.users = [job]
    memory.give_back(first)  # as a request that nobody wants any more, in the middle of a job
    second = memory.take(5000)
    assert second.offset >= first.offset + 5000
    job.set_result(None)
    assert memory.take(4000) is first
    del first, second
    memory.close()
    with open_loader("pyav", videos, SIZE, CPU, workers=2, ahead=2) as loader:
        for _ in loader.batches(requests(videos, 12)):
            pass
        assert loader._memory.bytes <= 4 * (20 * SIZE[0] * SIZE[1] * 3 + 4096)


def test_decoding_processes_end_with_a_killed_parent(paths):
    script = (
        "import sys, torch\n"
        "from interpreter.data import open_video\n"
        "from interpreter.data.loaders import open_loader\n"
        "videos = [open_video(path) for path in sys.argv[1:]]\n"
        "loader = open_loader('pyav', videos, (48, 80), torch.device('cpu'), workers=2)\n"
        "loader.batch(torch.arange(30), torch.zeros(30, dtype=torch.bool))\n"
        "print(*(p.process.pid for p in loader._processes), flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, "-c", script, *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_cached_frames_are_announced_and_can_be_stopped(videos):
    counts = []
    open_loader("torch", videos, SIZE, CPU, workers=2, advance=counts.append).close()
    assert counts == [31, 7, 12, 3]

    def stop(frames):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_loader("torch", videos, SIZE, CPU, workers=2, advance=stop)


def test_cached_frames_are_as_many_as_were_counted(paths, videos, moving):
    Image.fromarray(moving(1, 60, 100)[0]).save(paths[1] / "7.jpg")
    videos[1].files = open_video(paths[1]).files[:-2]
    counted = open_loader("torch", videos, SIZE, CPU, workers=2)
    counted.close()
    frames = videos[1].frames
    videos[1].frames = lambda size: list(frames(size))[:-1]
    with pytest.raises(VideoError, match=r"jpeg: not the 6 frames of before"):
        open_loader("torch", videos, SIZE, CPU, workers=2)


@pytest.fixture
def h264(tmp_path, moving, encode):
    return open_video(encode(tmp_path / "h264.mp4", moving(5)))


@pytest.fixture
def turned(tmp_path, moving, encode):
    return open_video(encode(tmp_path / "turned.mov", moving(5), "mjpeg", "yuvj420p", rotation=90))


def test_videos_know_their_codec_and_orientation(h264, turned, videos):
    assert [h264.codec, h264.orientation.transposed] == ["h264", False]
    assert [turned.codec, turned.orientation.transposed] == ["mjpeg", True]
    assert [video.codec for video in videos if isinstance(video, VideoFile)] == ["vp9", "mjpeg"]


def test_dali_refuses_what_it_cannot_decode_before_it_starts(h264, turned, videos, monkeypatch):
    monkeypatch.setattr(loaders_module, "_dali_installed", lambda: True)
    assert dali_obstacle(videos, CPU) is None
    assert dali_obstacle([*videos, h264], torch.device("cuda")) is None
    message = r"--loader dali: DALI does not decode h264 on a CPU: .*h264\.mp4 and 1 more; use --loader pyav, or auto$"
    with pytest.raises(ValueError, match=message):
        open_loader("dali", [*videos, h264, h264], SIZE, CPU)
    for device in (CPU, torch.device("cuda")):
        assert "does not turn or mirror videos" in dali_obstacle([*videos, turned], device)


def test_dali_that_is_not_installed_is_one_line(videos, monkeypatch):
    monkeypatch.setattr(loaders_module, "_dali_installed", lambda: False)
    with pytest.raises(ValueError, match=r"NVIDIA DALI is not installed \(pip install .*dali.*use --loader pyav"):
        open_loader("dali", videos, SIZE, CPU)
    assert choose_loader(videos, SIZE, torch.device("cuda")) != "dali"


def test_dali_counts_as_missing_where_not_even_its_parent_package_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    assert not loaders_module._dali_installed()


def test_auto_takes_memory_then_dali_on_a_gpu_then_processes(videos, h264, turned, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(loaders_module, "_dali_installed", lambda: True)
    needed = 53 * SIZE[0] * SIZE[1] * 3
    monkeypatch.setattr(loaders_module, "free_memory", lambda: 4 * needed)
    assert choose_loader(videos, SIZE, CPU) == choose_loader(videos, SIZE, cuda) == "torch"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_loader(videos, SIZE, cuda) == "dali"
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(loaders_module, "free_memory", lambda: 4 * needed - 4)
    assert choose_loader([*videos, h264], SIZE, cuda) == "dali"
    assert choose_loader([*videos, h264], SIZE, CPU) == "pyav"
    assert choose_loader(videos, SIZE, CPU) == "pyav"
    assert choose_loader([*videos, turned], SIZE, cuda) == "pyav"
    with open_loader("auto", videos, SIZE, CPU, workers=1) as loader:
        assert loader.name == "pyav"


def test_frames_that_do_not_fit_are_refused_before_they_are_decoded(videos, monkeypatch):
    monkeypatch.setattr(loaders_module, "free_memory", lambda: 10)
    with pytest.raises(ValueError, match=r"--loader torch: all frames together are 0\.0 GB, but .*--loader pyav"):
        open_loader("torch", videos, SIZE, CPU)


def test_names_of_files_need_not_be_utf8(tmp_path, moving):
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9 \xff")
    try:
        write_folder(folder, moving(2, *SIZE), ".png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    video = open_video(folder)
    for engine in ("pyav", "torch", "dali") if HAS_DALI else ("pyav", "torch"):
        with open_loader(engine, [video], SIZE, CPU, workers=1) as loader:
            assert np.array_equal(loader.batch(*whole([video])), truth([video], whole([video])))


def test_free_memory_is_positive_and_at_most_the_machines():
    assert 0 < loaders_module.free_memory() <= psutil.virtual_memory().total


def test_unknown_loaders_are_refused(videos):
    with pytest.raises(ValueError, match=r"unknown loader 'decord'; choose from auto, dali, pyav, torch"):
        open_loader("decord", videos, SIZE, CPU)


@needs_dali
def test_dali_that_finds_other_frames_is_not_used(videos, monkeypatch):
    read = VideoFile.read
    monkeypatch.setattr(VideoFile, "read", lambda self, frames, size=None: read(self, [f + 3 for f in frames], size))
    with pytest.raises(LoaderError, match=r"DALI and PyAV differ in frame 15 of .*vp9\.webm.*--loader pyav"):
        open_loader("dali", videos, SIZE, CPU, workers=1)


def test_the_worker_imports_no_torch():
    code = "import sys, interpreter.data.video.decode_worker; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_arrive_on_the_gpu(engine, videos, h264):
    """Also while the memory of earlier batches is used again."""
    clips = [*videos, h264]
    asked = requests(clips, 8)
    expected = [truth(clips, request).astype(float) for request in asked]
    with open_loader(engine, clips, SIZE, torch.device("cuda"), workers=2) as loader:
        for found, pixels in zip(loader.batches(asked), expected, strict=True):
            assert found.is_cuda
            difference = np.abs(found.cpu().numpy() - pixels)
            assert difference.mean() < 2 if engine == "dali" else difference.max() == 0
            del found
