"""Every reader on cut and bit-flipped files: one clear error or a skip that names the file, never a crash or a hang."""

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interpreter.data import open_dataset
from interpreter.data.datasets.annotations import read_mask
from interpreter.data.images import read_rgb

from ..videos import write_frames
from .releases import (
    compressed,
    damage,
    png,
    uncompressed,
    write_fbms,
    write_segtrack,
    write_ytvis,
    write_ytvos,
    ytvis_annotation,
    ytvis_video,
)

SIZE = (12, 20)
MASKS = np.zeros((3, *SIZE), bool)
for t in range(3):
    MASKS[t, 2 + t : 9, 3 : 12 + t] = True


def make_ytvis(root):
    video = ytvis_video(1, "a", 3, SIZE)
    tracks = [
        [compressed(MASKS[0]), None, uncompressed(MASKS[2])],
        [uncompressed(MASKS[1]), compressed(MASKS[2]), None],
    ]
    return write_ytvis(root, [video], [ytvis_annotation(n, video, track) for n, track in enumerate(tracks)]).parent


def make_ytvos(root):
    write_ytvos(root, "a", [MASKS[0], None, 2 * MASKS[1].astype(int)], size=SIZE)


def make_segtrack(suffix):
    def make(root):
        write_segtrack(root, "a", list(MASKS[None]), suffix, size=SIZE)

    return make


def make_fbms(gray):
    def make(root):
        write_fbms(root, "Testset", "a", 3, {t: MASKS[t].astype(int) for t in (0, 2)}, [0, 200], SIZE, gray)

    return make


def make_davis(root):
    write_frames(root / "JPEGImages/480p/a", 2, SIZE)
    for t, mask in enumerate(write_frames(root / "Annotations_unsupervised/480p/a", 2, SIZE, name="{:05d}.png")):
        mask.write_bytes(png(MASKS[t].astype(np.uint8)))
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/train.txt").write_text("a\n")


RELEASES = {
    "ytvis": ("ytvis", make_ytvis),
    "ytvos": ("ytvos", make_ytvos),
    "segtrack-png": ("segtrack", make_segtrack(".png")),
    "segtrack-bmp": ("segtrack", make_segtrack(".bmp")),
    "fbms-ppm": ("fbms", make_fbms(gray=False)),
    "fbms-pgm": ("fbms", make_fbms(gray=True)),
    "davis": ("davis", make_davis),
}


@pytest.mark.parametrize("name", RELEASES)
def test_damaged_file_of_a_release(tmp_path, name):
    kind, make = RELEASES[name]
    make(tmp_path / "root")
    files = sorted(path for path in (tmp_path / "root").rglob("*") if path.is_file() and path.name != "CSI_NY.jpg")
    rng = np.random.default_rng(len(name))
    refused = 0
    for _ in range(120):
        file = files[rng.integers(0, len(files))]
        whole = file.read_bytes()
        file.write_bytes(damage(whole, rng))
        try:
            dataset = open_dataset(kind, tmp_path / "root")
            for index, video in enumerate(dataset.videos):
                assert len(list(video.frames())) == video.num_frames
                masks = dataset.masks(index)
                assert masks is None or masks.shape == (video.num_frames, video.height, video.width)
        except (ValueError, OSError) as error:
            message = str(error)
            assert "\n" not in message
            assert str(tmp_path) in message
            refused += 1
        finally:
            file.write_bytes(whole)
    assert refused > 30  # the damage is real
    assert open_dataset(kind, tmp_path / "root").skipped == []


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Image size:PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "gif", "pgm", "tiff"])
def test_damaged_image_is_one_of_three_exceptions(tmp_path, suffix):
    """Also files whose name does not match their format: Pillow reads the format from the content."""
    (source,) = write_frames(tmp_path, 1, (16, 24), name="{:05d}." + suffix)
    path = source.rename(tmp_path / "frame.png")
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(300):
        path.write_bytes(damage(whole, rng))
        for read in (read_rgb, lambda path: read_mask(path, (16, 24))):
            with suppress(OSError, SyntaxError, ValueError):
                read(path)


def test_image_that_declares_absurd_sizes_is_refused(tmp_path):
    (path,) = write_frames(tmp_path, 1, (16, 24), name="{:05d}.bmp")
    content = bytearray(path.read_bytes())
    content[18:26] = (30_000).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match="exceeds limit"):
        read_rgb(path)


leaves = st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=8)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))
PATHS = ["videos", "annotations", "videos.0", "videos.0.id", "videos.0.file_names", "videos.0.file_names.1",
         "videos.0.height", "annotations.0", "annotations.0.video_id", "annotations.0.segmentations",
         "annotations.0.segmentations.0", "annotations.0.segmentations.0.size",
         "annotations.0.segmentations.0.counts", "annotations.0.iscrowd"]  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_ytvis(tmp_path_factory.mktemp("ytvis")) / "train.json"


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=trees)
def test_index_with_arbitrary_values_is_read_or_refused(index, path, value):
    """Well-formed JSON with wrong values."""
    whole = index.read_text()
    content = json.loads(whole)
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    index.write_text(json.dumps(content))
    message = str(index.parent)
    try:
        dataset = open_dataset("ytvis", index.parent, "train")
        for video in range(len(dataset)):
            masks = dataset.masks(video)
            assert masks is None or masks.shape == (3, *SIZE)
    except ValueError as error:
        message = str(error)
    finally:
        index.write_text(whole)
    assert str(index.parent) in message
