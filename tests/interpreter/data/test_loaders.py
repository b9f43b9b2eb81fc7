"""Loaders return the pixels of `Video.read`, for any number of workers and of batches that are loaded ahead."""

import itertools
import os
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from interpreter.data import VideoError, open_video
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import Loader, LoaderError, open_loader
from interpreter.data.loaders.base import split
from interpreter.data.loaders.open import dali_is_installed
from interpreter.data.video.file import VideoFile

from ..videos import cut, encode, moving, save_frames
from .loading import CPU, ENGINES, SIZE, children, needs_dali, requests, truth, whole


@pytest.mark.parametrize("engine", ["pyav", "torch"])
def test_pixels_are_those_of_video_read(engine, videos):
    with open_loader(engine, videos, SIZE, CPU, workers=2) as loader:
        for request in requests(videos):
            pixels = loader.batch(*request)
            assert pixels.dtype == torch.uint8
            assert np.array_equal(pixels, truth(videos, request))


@needs_dali
def test_dali_gives_the_same_frames_within_a_rounding(videos):
    all_frames = truth(videos, whole(videos)).astype(float)
    starts = np.cumsum([0] + [video.num_frames for video in videos])
    with open_loader("dali", videos, SIZE, CPU, workers=2) as loader:
        pixels = loader.batch(*whole(videos)).numpy()
        for index, (start, end) in enumerate(itertools.pairwise(starts)):
            apart = np.abs(pixels[start:end, None] - all_frames[None, start:end])
            difference = apart.mean((2, 3, 4))
            assert np.array_equal(difference.argmin(1), np.arange(end - start))  # no frame but the one asked for
            if videos[index].path.is_dir():  # native pixels are equal; the resize rounds differently
                assert max(apart[t, t].max() for t in range(end - start)) <= 1
            else:  # chroma is interpolated differently before the resize, which is visible at these hard edges
                assert difference.diagonal().max() < 2
        for request in requests(videos):
            assert np.abs(loader.batch(*request).numpy() - truth(videos, request).astype(float)).mean() < 2


@pytest.mark.parametrize("codec", ["libvpx-vp9", "mjpeg"])
@needs_dali
def test_dali_agrees_on_real_pictures(codec, real_clips, tmp_path):
    frames = open_video(real_clips["carphone_pristine"]).read(range(0, 60, 3))
    path = encode(tmp_path / "clip.mkv", frames, codec, "yuvj420p" if codec == "mjpeg" else "yuv420p")
    folder = save_frames(tmp_path / "frames", frames, "{}.jpg", quality=92)
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


def test_the_iterator_keeps_no_batch_alive(videos):
    with open_loader("pyav", videos, SIZE, CPU, workers=1) as loader:
        batches = loader.batches(requests(videos, 3))
        pixels = weakref.ref(next(batches))
        assert pixels() is None


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


def test_pieces_cover_the_request_and_hold_one_video_and_flip():
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
def test_damage_after_the_check_is_one_error_that_names_the_file(engine, damage, paths, videos):
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
    if loader:  # continues with the intact videos
        last = torch.tensor([52]), torch.tensor([False])
        assert np.abs(loader.batch(*last).numpy() - videos[3].read([2], SIZE).astype(float)).max() <= 1
        loader.close()
    assert not children()


def test_decoding_into_memory_reports_frames_and_can_be_stopped(videos):
    counts = []
    open_loader("torch", videos, SIZE, CPU, workers=2, advance=counts.append).close()
    assert counts == [31, 7, 12, 3]

    def stop(frames):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_loader("torch", videos, SIZE, CPU, workers=2, advance=stop)


def test_cached_frames_are_as_many_as_were_counted(paths, videos):
    Image.fromarray(moving(1, 60, 100)[0]).save(paths[1] / "7.jpg")
    videos[1].files = open_video(paths[1]).files[:-2]
    counted = open_loader("torch", videos, SIZE, CPU, workers=2)
    counted.close()
    frames = videos[1].frames
    videos[1].frames = lambda size: list(frames(size))[:-1]
    with pytest.raises(VideoError, match=r"jpeg: 6 frames were counted, but another number was decoded"):
        open_loader("torch", videos, SIZE, CPU, workers=2)


def test_names_of_files_need_not_be_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9 \xff")
    try:
        save_frames(folder, moving(2, *SIZE), "{}.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    video = open_video(folder)
    for engine in ("pyav", "torch", "dali") if dali_is_installed() else ("pyav", "torch"):
        with open_loader(engine, [video], SIZE, CPU, workers=1) as loader:
            assert np.array_equal(loader.batch(*whole([video])), truth([video], whole([video])))


@needs_dali
def test_dali_that_finds_other_frames_is_not_used(videos, monkeypatch):
    read = VideoFile.read
    monkeypatch.setattr(VideoFile, "read", lambda self, frames, size=None: read(self, [f + 3 for f in frames], size))
    with pytest.raises(LoaderError, match=r"DALI and PyAV differ in frame 15 of .*vp9\.webm.*--loader pyav"):
        open_loader("dali", videos, SIZE, CPU, workers=1)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_pixels_arrive_on_the_gpu(engine, videos, h264):
    """Also while the memory of earlier batches is used again."""
    clips = [*videos, h264]
    asked = requests(clips, 8)
    expected = [truth(clips, request).astype(float) for request in asked]
    with open_loader(engine, clips, SIZE, torch.device("cuda"), workers=2) as loader:
        for on_gpu, decoded in zip(loader.batches(asked), expected, strict=True):
            assert on_gpu.is_cuda
            difference = np.abs(on_gpu.cpu().numpy() - decoded)
            assert difference.mean() < 2 if engine == "dali" else difference.max() == 0
            del on_gpu
