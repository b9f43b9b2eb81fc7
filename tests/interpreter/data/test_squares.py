"""Square crops: central views of videos and masks, and random squares that loaders cut."""

import numpy as np
import pytest
import torch
from PIL import Image

from interpreter.configs import DataConfig, VideosConfig
from interpreter.data import open_dataset, open_video
from interpreter.data.loaders import Request, choose_loader, dali_obstacle, open_loader
from interpreter.data.loaders import open as opening
from interpreter.data.loaders.base import split
from interpreter.data.video import Box, CentralSquare, CroppedVideo
from interpreter.data.video.squares import cut_square, uncut_size
from interpreter.engine.videos import open_videos
from interpreter.store.files import read_content, require_unchanged

from ..videos import encode, moving, save_frames
from .loading import CPU
from .releases import compressed, write_ytvis, ytvis_annotation, ytvis_video

SIDE = 32


@pytest.fixture
def clips(tmp_path):
    """A landscape video of three times the side, a portrait folder that is enlarged, and a square folder."""
    return [
        open_video(encode(tmp_path / "wide.webm", moving(20, 96, 160), "libvpx-vp9", g=12)),
        open_video(save_frames(tmp_path / "tall", moving(6, 45, 24, seed=1), "{}.png")),
        open_video(save_frames(tmp_path / "square", moving(4, 40, 40, seed=2), "{}.png")),
    ]


def by_hand(videos, request):
    """Resize with Pillow until the shorter side is SIDE, cut, mirror."""
    frames = [frame for video in videos for frame in video.frames()]
    squares = []
    for number, flip, offset in zip(*(part.tolist() for part in request), strict=True):
        image = Image.fromarray(frames[number])
        scale = SIDE / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
        longer = max(image.size)
        first = min(int(offset * (longer - SIDE + 1)), longer - SIDE)
        left, top = (first, 0) if image.width > image.height else (0, first)
        square = np.array(image.crop((left, top, left + SIDE, top + SIDE)))
        squares.append(square[:, ::-1] if flip else square)
    return np.stack(squares)


def requests(count, size=14):
    rng = np.random.default_rng(0)
    for _ in range(count):
        offsets = rng.random(size, np.float32)
        offsets[:3] = 0, 1, 0.5
        numbers = rng.integers(0, 30, size)
        numbers[-2:] = numbers[0]  # one frame three times, its squares at several places
        yield Request(*map(torch.from_numpy, (numbers, rng.random(size) < 0.5, offsets)))


@pytest.mark.parametrize("views", [False, True], ids=["whole", "central views"])
@pytest.mark.parametrize("engine", ["pyav", "torch"])
def test_random_squares_are_those_cut_by_hand(engine, views, clips):
    videos = [CentralSquare(clip) for clip in clips] if views else clips
    asked = list(requests(4))
    with open_loader(engine, videos, (SIDE, SIDE), CPU, workers=2, squares=True) as loader:
        for request, pixels in zip(asked, loader.batches(asked), strict=True):
            assert np.array_equal(pixels, by_hand(clips, request))


def test_cutting_before_resizing_differs_at_the_border_alone(tmp_path):
    video = open_video(save_frames(tmp_path / "clip", moving(4, 96, 159), "{}.png"))
    offsets = torch.full((4,), 10.5 / 22)  # the 11th of 22 places, 10 pixels or 30 of the original from the left
    with open_loader("pyav", [video], (SIDE, SIDE), CPU, workers=1, squares=True) as loader:
        pixels = loader.batch(torch.arange(4), torch.zeros(4, dtype=torch.bool), offsets).numpy()
    first = CroppedVideo(video, Box(0, 96, 30, 126)).read(range(4), (SIDE, SIDE))
    assert np.array_equal(pixels[:, :, 1:-1], first[:, :, 1:-1])
    assert not np.array_equal(pixels, first)  # at the border the filter reaches over the cut


@pytest.mark.parametrize("shape", [(4, 9, 3), (9, 4, 3), (5, 5, 3)])
def test_uniform_offsets_choose_all_places_equally_often(shape):
    places = np.arange(max(shape))
    frame = places[:, None, None] if shape[0] > shape[1] else places[None, :, None]
    offsets = (np.arange(6000) + 0.5) / 6000
    squares = np.stack([cut_square(np.broadcast_to(frame, shape), offset) for offset in offsets])
    assert squares.shape[1:3] == (min(shape[:2]),) * 2
    firsts, counts = np.unique(squares[:, 0, 0, 0], return_counts=True)
    assert firsts.tolist() == list(range(abs(shape[0] - shape[1]) + 1))
    assert (counts == counts[0]).all()


def test_pieces_carry_the_offsets_of_their_frames(clips):
    with open_loader("pyav", clips, (SIDE, SIDE), CPU, workers=1, squares=True) as loader:
        (request,) = requests(1)
        for piece in split(request, loader.index, 3):
            assert np.array_equal(piece.offsets, request.offsets[piece.rows])


@pytest.mark.parametrize("engine", ["pyav", "torch"])
def test_offsets_are_refused_where_they_do_not_belong(engine, clips):
    frames, flips = torch.tensor([0, 5]), torch.zeros(2, dtype=torch.bool)
    with open_loader(engine, clips, (SIDE, SIDE), CPU, workers=1) as loader:
        with pytest.raises(ValueError, match="this loader cuts no squares"):
            loader.batch(frames, flips, torch.rand(2))
        assert len(loader.batch(frames, flips)) == 2
    with open_loader(engine, clips, (SIDE, SIDE), CPU, workers=1, squares=True) as loader:
        with pytest.raises(ValueError, match=r"--crop random\) needs the offsets"):
            loader.batch(frames, flips)
        for wrong in ([0.5], [0.5, 1.5], [-0.1, 0.5], [0.5, float("nan")]):
            with pytest.raises(ValueError, match="offsets must be 2 numbers from 0 to 1"):
                loader.batch(frames, flips, torch.tensor(wrong))
    with pytest.raises(ValueError, match="squares need a square size, got 32x48"):
        open_loader(engine, clips, (32, 48), CPU, squares=True)


def test_dali_refuses_squares_and_auto_avoids_it(clips, monkeypatch):
    monkeypatch.setattr(opening, "dali_is_installed", lambda: True)
    cuda = torch.device("cuda")
    assert dali_obstacle(clips, cuda) is None
    with pytest.raises(ValueError, match=r"--loader dali: .*random squares .*--crop random.*use --loader pyav"):
        open_loader("dali", clips, (SIDE, SIDE), CPU, squares=True)
    with pytest.raises(ValueError, match=r"--loader dali: DALI does not cut squares.*wide.*use --loader pyav"):
        open_loader("dali", [CentralSquare(clips[0])], (SIDE, SIDE), CPU)
    whole = sum(len(clip) * np.prod(uncut_size(clip, SIDE)) * 3 for clip in clips)
    assert uncut_size(CentralSquare(clips[0]), SIDE) == (32, 53)
    monkeypatch.setattr(opening, "free_memory", lambda: 4 * whole)
    assert choose_loader(clips, (SIDE, SIDE), cuda, squares=True) == "torch"
    monkeypatch.setattr(opening, "free_memory", lambda: 4 * whole - 4)  # whole frames take more memory than squares
    assert choose_loader(clips, (SIDE, SIDE), cuda) == "torch"
    assert choose_loader(clips, (SIDE, SIDE), cuda, squares=True) == "pyav"


@pytest.mark.parametrize(("height", "width", "box"), [(45, 24, (10, 34, 0, 24)), (24, 45, (0, 24, 10, 34))])
def test_central_square_reads_the_middle_of_the_frames(height, width, box, tmp_path):
    video = open_video(save_frames(tmp_path / "clip", moving(3, height, width), "{}.png"))
    top, bottom, left, right = box
    expected = video.read(range(3))[:, top:bottom, left:right]
    square = CentralSquare(video)
    assert (square.height, square.width, square.num_frames, square.name) == (24, 24, 3, "clip")
    np.testing.assert_array_equal(np.stack(list(square.frames())), expected)
    resized = [np.array(Image.fromarray(frame).resize((16, 16), Image.Resampling.BILINEAR)) for frame in expected]
    np.testing.assert_array_equal(square.read(range(3), (16, 16)), np.stack(resized))


@pytest.fixture
def release(tmp_path):
    """A video of YouTube-VIS with black bars, and one that is square; an object in both; the pixels of the first."""
    picture = moving(3, 96, 136)
    page = np.zeros((3, 144, 136, 3), np.uint8)
    page[:, 24:120] = picture
    videos = [ytvis_video(1, "barred", 3, (144, 136)), ytvis_video(2, "square", 3, (64, 64))]
    masks = [np.zeros((3, *size), bool) for size in ((144, 136), (64, 64))]
    for mask in masks:
        mask[:, 30:50, 15:40] = True
    annotations = [
        ytvis_annotation(number, video, [compressed(one) for one in mask])
        for number, (video, mask) in enumerate(zip(videos, masks, strict=True), 1)
    ]
    write_ytvis(tmp_path, videos, annotations)
    for frame, name in zip(page, videos[0]["file_names"], strict=True):
        Image.fromarray(frame).save(tmp_path / "train/JPEGImages" / name, quality=95)
    return tmp_path, masks[0]


def test_masks_are_cropped_like_frames_borders_first(release):
    root, masks = release
    whole = open_dataset("ytvis", root, "train")
    for borders, (top, bottom, left, right) in {False: (4, 140, 0, 136), True: (24, 120, 20, 116)}.items():
        cropped = open_dataset("ytvis", root, "train", crop_borders=borders, central_square=True)
        np.testing.assert_array_equal(
            cropped[0].read(range(3)), whole[0].read(range(3))[:, top:bottom, left:right], strict=True
        )
        np.testing.assert_array_equal(cropped.masks(0), masks[:, top:bottom, left:right])
        np.testing.assert_array_equal(cropped.masks(1), whole.masks(1))
        assert not isinstance(cropped[1], CroppedVideo)  # it is square already


def test_random_crops_are_opened_as_central_squares(release, tmp_path):
    digests = {}
    for crop in ("none", "central", "random"):
        config = VideosConfig("ytvis", release[0], "train", crop_borders=True, crop=crop)
        video = open_videos(config, tmp_path / "run")[0]
        assert (video.height, video.width) == ((96, 136) if crop == "none" else (96, 96))
        content = read_content(video)
        digests[crop] = content.digest
        require_unchanged(video, content)
    assert digests["none"] != digests["central"] == digests["random"]
    with open_loader("pyav", [video], (96, 96), CPU, workers=1, squares=True) as loader:
        pixels = loader.batch(torch.tensor([1, 1]), torch.zeros(2, dtype=torch.bool), torch.tensor([0.0, 1.0]))
    inside = CroppedVideo(video.inner.inner, Box(24, 120, 0, 136)).read([1])[0]  # the frame without its borders
    np.testing.assert_array_equal(pixels[0], inside[:, :96])
    np.testing.assert_array_equal(pixels[1], inside[:, 40:])


def test_squares_are_not_squeezed_into_rectangles():
    for crop in ("central", "random"):
        with pytest.raises(ValueError, match=rf"--crop {crop} .*--frame-size 128 192 .*--frame-size 128 128"):
            DataConfig(crop=crop, frame_size=(128, 192))
        assert DataConfig(crop=crop, frame_size=(96, 96)).crop == crop
