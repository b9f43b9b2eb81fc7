"""Text that other systems wrote: byte-order marks, UTF-16, line ends, backslashes; in every file that is read."""

import codecs
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from interpreter.commands import run_command
from interpreter.data import VideoError, open_dataset
from interpreter.data.datasets.layout import claim
from interpreter.data.predictions import PredictionError, open_predictions
from interpreter.engine.records import read_records, truncate_records
from interpreter.engine.run import read_config
from interpreter.files import read_text

from .data.releases import compressed, write_fbms, write_ytvis, ytvis_annotation, ytvis_video
from .videos import write_frames

SIZE = (12, 20)
MASK = np.zeros(SIZE, bool)
MASK[2:6, 3:9] = True


def windows(encoding):
    """Text as programs on Windows write it."""
    return lambda text: text.replace("\n", "\r\n").encode(encoding)


SYSTEMS = {
    "notepad": windows("utf-8-sig"),
    "powershell": lambda text: codecs.BOM_UTF16_LE + windows("utf-16-le")(text),
    "big endian": lambda text: codecs.BOM_UTF16_BE + windows("utf-16-be")(text),
    "utf-16 without a mark": windows("utf-16-le"),
    "old mac": lambda text: text.replace("\n", "\r").encode(),
    "trailing blanks": lambda text: text.replace("\n", " \t\n\n").encode(),
}
every_system = pytest.mark.parametrize("written", SYSTEMS.values(), ids=SYSTEMS.keys())


@every_system
def test_text_is_the_same_whoever_wrote_it(tmp_path, written):
    (tmp_path / "list.txt").write_bytes(written("bear\ncafé\n"))
    assert read_text(tmp_path / "list.txt").split() == ["bear", "café"]
    assert "\r" not in read_text(tmp_path / "list.txt")


def test_marks_inside_of_joined_files_are_no_text(tmp_path):
    part = windows("utf-8-sig")
    (tmp_path / "list.txt").write_bytes(part("bear\n") + part("camel\n") + part("") + part("dog"))
    assert read_text(tmp_path / "list.txt") == "bear\ncamel\ndog"


@every_system
@pytest.mark.parametrize(("year", "line"), [(2017, "{}"), (2016, r"\JPEGImages\480p\{}\00000.jpg \Annotations\480p\x")])
def test_davis_lists(tmp_path, written, year, line):
    for name in ("bear", "camel"):
        write_frames(tmp_path / "JPEGImages" / "480p" / name, 2, SIZE)
    sets = tmp_path / "ImageSets" / str(year)
    sets.mkdir(parents=True)
    (sets / "val.txt").write_bytes(written("".join(line.format(name) + "\n" for name in ("bear", "camel"))))
    (sets / "._val.txt").write_bytes(b"\0\5\x16\7\xff\xfe")
    for split in ("val", None):
        dataset = open_dataset("davis", tmp_path, split, year=year)
        assert [video.name for video in dataset.videos] == ["bear", "camel"]
        assert dataset.skipped == []


@every_system
def test_youtube_vis_index_and_results(tmp_path, written):
    video = ytvis_video(7, "a", 2, SIZE)
    index = write_ytvis(tmp_path, [video], [ytvis_annotation(1, video, [compressed(MASK), None])])
    content = json.loads(index.read_text())
    content["videos"][0]["file_names"] = [name.replace("/", "\\") for name in content["videos"][0]["file_names"]]
    index.write_bytes(written(json.dumps(content, indent=1)))
    np.testing.assert_array_equal(open_dataset("ytvis", tmp_path, "train").masks(0)[0], MASK)
    entry = {"video_id": 7, "category_id": 1, "score": 0.5, "segmentations": [compressed(MASK)]}
    (tmp_path / "r.json").write_bytes(written(json.dumps([entry], indent=1)))
    np.testing.assert_array_equal(open_predictions(tmp_path / "r.json").labels("7", 1, SIZE)[0], MASK)


@every_system
def test_fbms_definition(tmp_path, written):
    truth = write_fbms(tmp_path, "Testset", "cars1", 4, {2: MASK.astype(int)}, [0, 200], SIZE)
    definition = truth / "cars1Def.dat"
    text = definition.read_text().replace("cars1_0002.ppm", r"C:\data\cars1_0002.ppm")
    definition.write_bytes(written(text.replace("Frame number:\n2", "Frame number:\n0")))
    for name in ("._cars1Def.dat", "._cars1_0002_gt.ppm"):
        (truth / name).write_bytes(b"\0\5\x16\7\xff\xfe")
    dataset = open_dataset("fbms", tmp_path, "test")
    assert dataset.mask_frames(0).tolist() == [2]
    np.testing.assert_array_equal(dataset.masks(0)[2], MASK)


@every_system
def test_files_of_a_run_and_of_a_conversion(tmp_path, written):
    config = {"format": 2, "method": "interpreter", "stages": {}, "trained_on": {"video": "abc"}}
    (tmp_path / "config.json").write_bytes(written(json.dumps(config, indent=2) + "\n"))
    assert read_config(tmp_path).trained_on == {"video": "abc"}
    (tmp_path / "converted.json").write_bytes(written('{"origin": "fbms",\n "num_videos": 1}\n'))
    claim(tmp_path / "converted.json", {"origin": "fbms", "num_videos": 2})
    (tmp_path / "image").mkdir()
    records = tmp_path / "image" / "metrics.jsonl"
    records.write_bytes(written('{"step": 1}\n{"step": 2}\n').replace(b" \t", b""))
    truncate_records(records, 1)
    assert read_records(tmp_path) == [{"step": 1}]


def test_records_of_all_stages_are_read_without_a_torn_line(tmp_path):
    for stage in ("model", "video-3"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text(f'{{"stage": "{stage}", "step": 1}}\n{{"stage": "{stage}", "st')
    assert read_records(tmp_path) == [{"stage": "model", "step": 1}, {"stage": "video-3", "step": 1}]


def test_damaged_json_says_where(tmp_path):
    write_ytvis(tmp_path, [ytvis_video(7, "a", 2, SIZE)], [])
    (tmp_path / "train.json").write_bytes(b'\xef\xbb\xbf{"videos": [],\r\n "annotations" []}')
    with pytest.raises(ValueError, match=r"train\.json: damaged JSON \(Expecting ':' delimiter: line 2 column 16"):
        open_dataset("ytvis", tmp_path, "train")
    (tmp_path / "r.json").write_bytes(b'\xef\xbb\xbf[{"video_id": 1},\r\n]')
    with pytest.raises(PredictionError, match=r"r\.json: not a JSON file .* line (1|2) column"):
        open_predictions(tmp_path / "r.json")


def test_other_encodings_are_named_with_what_to_do(tmp_path):
    write_frames(tmp_path / "JPEGImages" / "480p" / "café", 2, SIZE)
    sets = tmp_path / "ImageSets" / "2017"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"val\.txt: not a text file in UTF-8 or UTF-16 \(.* at byte 3\); save it as UTF"
    ):
        open_dataset("davis", tmp_path, "val")
    (tmp_path / "r.json").write_bytes('[{"video_id": "café"}]'.encode("latin-1"))
    with pytest.raises(PredictionError, match="save it as UTF-8"):
        open_predictions(tmp_path / "r.json")
    (tmp_path / "config.json").write_bytes(b'{"image_weights": "\xe9"}')
    with pytest.raises(ValueError, match=r"config\.json is not the configuration of a run .*UTF-8"):
        read_config(tmp_path)
    truth = write_fbms(tmp_path, "Testset", "cars1", 2, {0: MASK.astype(int)}, [0, 200], SIZE)
    (truth / "cars1Def.dat").write_bytes("Total number of régions:".encode("latin-1"))
    with pytest.raises(VideoError, match=r"cars1Def\.dat: not a text file"):
        open_dataset("fbms", tmp_path, "test")


@pytest.mark.parametrize("name", [r"..\..\secret.jpg", r"a\..\..\secret.jpg", r"\\server\share\x.jpg", r"\x.jpg"])
def test_backslashes_do_not_lead_out_of_the_folder(tmp_path, name):
    video = ytvis_video(7, "a", 2, SIZE)
    index = write_ytvis(tmp_path, [video, ytvis_video(8, "b", 2, SIZE)], [])
    content = json.loads(index.read_text())
    content["videos"][0]["file_names"][1] = name
    index.write_text(json.dumps(content))
    dataset = open_dataset("ytvis", tmp_path, "train")
    assert [video.name for video in dataset.videos] == ["b"]
    assert "no path below the folder of frames" in dataset.report()


def test_accents_in_an_index_find_the_files_of_a_mac(tmp_path):
    stored, written = "cafe\u0301", "caf\u00e9"
    write_frames(tmp_path / "JPEGImages" / "480p" / stored, 2, SIZE)
    masks = tmp_path / "Annotations_unsupervised" / "480p" / stored
    masks.mkdir(parents=True)
    for t in range(2):
        Image.fromarray(MASK.astype(np.uint8)).save(masks / f"{t:05d}.png")
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text(written, encoding="utf-8")
    dataset = open_dataset("davis", tmp_path, "val")
    assert dataset.masks(0).any()
    assert open_predictions(masks.parent).labels(dataset[0].name, 2, SIZE).any()
    assert open_predictions(masks.parent).labels(stored, 2, SIZE).any()


def test_names_that_are_not_unicode_are_printed_all_the_same(monkeypatch):
    """As Linux gives a file whose name was written in Latin-1: caf\\xe9.mp4."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", shown)
    with pytest.raises(SystemExit) as left:
        run_command(lambda: print("left out: caf\udce9.mp4") or 0)
    shown.flush()
    assert left.value.code == 0
    assert shown.buffer.getvalue() == b"left out: caf\\udce9.mp4\n"
