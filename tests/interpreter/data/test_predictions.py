"""Saved masks of other methods: files of every format, whole, cut, with flipped bits and with wrong headers."""

import json
import zipfile
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from interpreter.data.predictions import PredictionError, open_predictions
from interpreter.render import write_palette_png
from interpreter.render.rle import RleWriter

FRAMES, SIZE = 4, (12, 18)
NAMES = ("boat", "deep/er/cat")


def maps_of(seed, dtype=np.uint8):
    """Label maps with ids 0..3, in blocks as objects are."""
    coarse = np.random.default_rng(seed).integers(0, 4, (FRAMES, 4, 6)).astype(dtype)
    return coarse.repeat(3, axis=1).repeat(3, axis=2)


TRUTH = {name: maps_of(seed) for seed, name in enumerate(NAMES)}


def write_png(root):
    for name, maps in TRUTH.items():
        for t, frame in enumerate(maps):
            write_palette_png(frame, root / "out" / name / f"{t:05d}.png")
    return root / "out"


def write_json(root):
    path = root / "results.json"
    with RleWriter(path) as writer:
        for name, maps in TRUTH.items():
            for frame in maps:
                writer.write(name, frame)
    entries = json.loads(path.read_text())
    assert len(entries) == 4 * len(TRUTH)
    path.write_text(json.dumps([entry for i, entry in enumerate(entries) if i % 4]))  # without the background, id 0
    return path


def write_npz(root):
    np.savez_compressed(root / "all.npz", **TRUTH)
    return root / "all.npz"


def write_npz_folder(root):
    for (name, maps), key in zip(TRUTH.items(), ("masks", "labels"), strict=True):
        file = root / "out" / f"{name}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{key: maps, "scores": np.ones(3)})
    return root / "out"


FORMATS = {"png": write_png, "json": write_json, "npz": write_npz, "npz folder": write_npz_folder}
every_format = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())


@every_format
def test_reads_back_what_was_saved(write, tmp_path):
    predictions = open_predictions(write(tmp_path))
    assert predictions.names == list(NAMES)
    for name, maps in TRUTH.items():
        assert np.array_equal(predictions.labels(name, FRAMES, SIZE), maps)
    assert predictions.background == (0 if write in (write_png, write_json) else None)


@every_format
def test_wrong_length_size_and_name_are_refused(write, tmp_path):
    path = write(tmp_path)
    predictions = open_predictions(path)
    for frames in (FRAMES - 1, FRAMES + 1):
        with pytest.raises(PredictionError, match=str(tmp_path)):
            predictions.labels("boat", frames, SIZE)
    with pytest.raises(PredictionError, match=str(tmp_path)):
        predictions.labels("boat", FRAMES, SIZE[::-1])
    with pytest.raises(PredictionError, match=r"no masks of video '\.\./boat'; it holds 2 videos: boat, deep/er/cat"):
        predictions.labels("../boat", FRAMES, SIZE)


def decoded_or_refused(path, name):
    """Read maps and check their form; None if reading raises the expected error, which names a file below ``path``."""
    try:
        maps = open_predictions(path).labels(name, FRAMES, SIZE)
    except (PredictionError, FileNotFoundError) as refusal:
        error = str(refusal)
    else:
        assert maps.shape == (FRAMES, *SIZE)
        assert maps.dtype in (np.uint8, np.uint16)
        return maps
    assert str(path) in error
    return None


def file_of_boat(path):
    """A file with masks of the video boat, in any format."""
    file = path if path.is_file() else sorted(path.rglob("boat*"))[0]
    return file if file.is_file() else file / "00002.png"


@every_format
def test_cut_files_are_refused(write, tmp_path):
    path = write(tmp_path)
    file = file_of_boat(path)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for length in (0, 1, len(whole) // 2, len(whole) - 1, *rng.integers(0, len(whole), 60)):
        file.write_bytes(whole[:length])
        maps = decoded_or_refused(path, "boat")  # the last bytes of a PNG, checksums and end marker, hold no pixel
        assert maps is None or (length > len(whole) - 24 and np.array_equal(maps, TRUTH["boat"]))
    file.write_bytes(whole)
    assert decoded_or_refused(path, "boat") is not None
    if path.is_dir():
        file.write_bytes(whole[:20])
        assert decoded_or_refused(path, "deep/er/cat") is not None  # the other videos are read although one is damaged


@every_format
def test_flipped_bits_are_refused_or_harmless(write, tmp_path):
    path = write(tmp_path)
    file = file_of_boat(path)
    whole, rng = file.read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(250):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            damaged[place] ^= 1 << rng.integers(0, 8)
        file.write_bytes(damaged)
        maps = decoded_or_refused(path, "boat")
        refused += maps is None
        if file.suffix == ".npz" and maps is not None:  # a checksum covers all data
            assert np.array_equal(maps, TRUTH["boat"])
    assert refused > 50


def test_entries_overlap_by_score_and_then_by_order(tmp_path):
    def entry(score, columns):
        mask = np.zeros(SIZE, np.uint8, order="F")
        mask[:, columns] = 1
        code = {"size": list(SIZE), "counts": coco.encode(mask)["counts"].decode()}
        return {"video_id": 7, "category_id": 3, "score": score, "segmentations": [code, None]}

    entries = [entry(0.5, slice(0, 6)), entry(0.9, slice(4, 10)), entry(0.5, slice(2, 12)), entry(1, slice(16, 17))]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    predictions = open_predictions(tmp_path / "r.json", video_ids={"clip": 7, "unseen": 8})
    assert predictions.names == ["clip"]
    first, second = predictions.labels("clip", 2, SIZE)
    assert first[0].tolist() == [1] * 4 + [2] * 6 + [3] * 2 + [0] * 4 + [4] + [0]
    assert not second.any()


def test_uncompressed_runs_are_read_too(tmp_path):
    entry = {"video_id": "v", "score": 1.0, "segmentations": [{"size": [2, 3], "counts": [1, 2, 3]}]}
    (tmp_path / "r.json").write_text(json.dumps([entry]))
    assert open_predictions(tmp_path / "r.json").labels("v", 1, (2, 3)).tolist() == [[[0, 1, 0], [1, 0, 0]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "entry 0 has score 'high'"),
        ({"score": float("nan")}, "entry 0 has score nan"),
        ({"score": None}, "entry 0 has score None"),
        ({"segmentations": None}, "no list of segmentations for 1 frames"),
        ({"segmentations": [None] * 2}, "2 segmentations for 1 frames"),
        ({"segmentations": [{"size": [2, 3], "counts": [7]}]}, "entry 0, video 'v', frame 0: "),
        ({"segmentations": ["mask"]}, "entry 0, video 'v', frame 0: "),
        ({"video_id": None}, "entry 0 is not an object with a video_id"),
        ({"video_id": [1]}, "entry 0 is not an object with a video_id"),
    ],
)
def test_malformed_entries_are_named(change, message, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps([{"video_id": "v", "score": 1.0, "segmentations": [None]} | change]))
    with pytest.raises(PredictionError) as refusal:
        open_predictions(file).labels("v", 1, (2, 3))
    assert str(refusal.value).startswith(f"{file}: ")
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", ["{}", "3", "[3]", "[" * 100_000, "", "\ud800", "[1" + "0" * 5000 + "]"], ids=range(7))
def test_other_json_is_refused(text, tmp_path):
    (tmp_path / "r.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PredictionError, match=r"r\.json"):
        open_predictions(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((FRAMES, *SIZE)), "float64"),
        (np.zeros((FRAMES, *SIZE, 1), int), r"\[4, 12, 18, 1\]"),
        (np.full((FRAMES, *SIZE), -1), r"ids -1\.\."),
        (np.full((FRAMES, *SIZE), 65536), r"\.\.65536"),
        (np.full((FRAMES, *SIZE), {}, object), "object"),
    ],
    ids=["float", "rank", "negative", "large", "pickle"],
)
def test_arrays_that_are_no_label_maps_are_refused(array, message, tmp_path):
    np.savez(tmp_path / "v.npz", masks=array)
    with pytest.raises(PredictionError, match=rf"v\.npz: .*{message}"):
        open_predictions(tmp_path / "v.npz").labels("v", FRAMES, SIZE)


def test_npz_header_that_declares_terabytes_is_refused(tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**20}, {2**11}, {2**11}), }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("masks.npy", data)
    with pytest.raises(PredictionError, match="1048576"):
        open_predictions(tmp_path / "v.npz").labels("v", FRAMES, SIZE)


def test_more_data_than_the_header_declares_is_refused(tmp_path):
    np.savez(tmp_path / "v.npz", masks=maps_of(0))
    with zipfile.ZipFile(tmp_path / "v.npz") as archive:
        data = archive.read("masks.npy")
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("masks.npy", data + b"\0")
    with pytest.raises(PredictionError, match="more bytes than its header declares"):
        open_predictions(tmp_path / "v.npz").labels("v", FRAMES, SIZE)


def test_ids_beyond_a_byte_are_kept(tmp_path):
    maps = maps_of(0).astype(np.int64) * 300
    np.savez(tmp_path / "v.npz", labels=maps)
    assert np.array_equal(open_predictions(tmp_path / "v.npz").labels("v", FRAMES, SIZE), maps)


def test_colour_images_are_no_masks(tmp_path):
    path = write_png(tmp_path)
    Image.new("RGB", SIZE[::-1], (128, 0, 0)).save(path / "boat" / "00001.png")
    with pytest.raises(PredictionError, match=r"boat/00001\.png: colours \(RGB\)"):
        open_predictions(path).labels("boat", FRAMES, SIZE)


def test_frames_are_in_natural_order(tmp_path):
    for t in range(11):
        write_palette_png(np.full(SIZE, t, np.uint8), tmp_path / "v" / f"{t}.png")
    assert open_predictions(tmp_path).labels("v", 11, SIZE)[:, 0, 0].tolist() == list(range(11))


def test_two_sets_of_masks_for_one_video_are_refused(tmp_path):
    one, other = (normalize(form, "café") for form in ("NFC", "NFD"))
    for name in (one, other):
        write_palette_png(np.zeros(SIZE, np.uint8), tmp_path / "png" / name / "0.png")
        (tmp_path / "npz").mkdir(exist_ok=True)
        np.savez(tmp_path / "npz" / f"{name}.npz", masks=maps_of(0))
    np.savez(tmp_path / "all.npz", **{one: maps_of(0), other: maps_of(1)})
    for path in (tmp_path / "png", tmp_path / "npz", tmp_path / "all.npz"):
        with pytest.raises(PredictionError, match=f"{path}: two sets of masks for video 'café': .* and .*; keep one"):
            open_predictions(path)


def test_nothing_to_read_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_predictions(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no \.png or \.npz"):
        open_predictions(tmp_path)
    (tmp_path / "masks.tar").touch()
    with pytest.raises(PredictionError, match=r"masks\.tar"):
        open_predictions(tmp_path / "masks.tar")
    np.savez(tmp_path / "two.npz", masks=maps_of(0), labels=maps_of(0))
    with pytest.raises(PredictionError, match=r"two\.npz: exactly one array"):
        open_predictions(tmp_path).labels("two", FRAMES, SIZE)
    np.savez(tmp_path / "none.npz")
    with pytest.raises(PredictionError, match=r"none\.npz: holds no arrays"):
        open_predictions(tmp_path / "none.npz")
