"""The command propagate and propagate_video: masks, scores, errors."""

import json
import shutil
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from interpreter import evaluate, propagate
from interpreter.commands import run_command
from interpreter.data import Video, open_dataset, open_video
from interpreter.metrics import PROTOCOLS, score_video
from interpreter.models.backbones import Backbone
from interpreter.models.label_propagation import LabelPropagation, Propagation, patch_labels
from interpreter.propagate import propagate_video
from interpreter.propagation import Encoder, first_mask, propagated
from interpreter.render import write_palette_png
from interpreter.segmentation import Segmentation

from .clips import make_folder, read_annotations
from .videos import save_frames

BACKBONE = ("--backbone", "efficientnet-lite0", "--frame-size", "64", "96")
SIZE = (48, 80)


def run(*arguments):
    return propagate.main([str(argument) for argument in arguments])


def discs(frames=6):
    """Two discs that move over a striped ground: frames uint8 [T, H, W, 3] and ids uint8 [T, H, W] (0, 3 and 200)."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    pictures = np.zeros((frames, *SIZE, 3), np.uint8)
    pictures[..., 1] = 60 + 40 * (rows // 6 % 2)
    ids = np.zeros((frames, *SIZE), np.uint8)
    for t in range(frames):
        for number, y, colour in ((3, 14, (240, 40, 40)), (200, 34, (60, 60, 250))):
            inside = (rows - y) ** 2 + (columns - 14 - 4 * t) ** 2 < 81
            pictures[t, inside], ids[t, inside] = colour, number
    return pictures, ids


@pytest.fixture
def clip(tmp_path):
    """A folder of frames, the PNG with the ids of the first, and the ids of all."""
    pictures, ids = discs()
    folder = save_frames(tmp_path / "walk", pictures, "{:05d}.png")
    write_palette_png(ids[0], tmp_path / "first.png")
    return folder, tmp_path / "first.png", ids


class Colours(Backbone):
    """Mean colours of patches of 4 pixels, minus the mean of each frame."""

    def __init__(self):
        super().__init__(3, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def tokens(self, x):
        tokens = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        return tokens - tokens.mean(1, keepdim=True)


class Alive(Video):
    """A video that counts how many of its frames are in memory."""

    def __init__(self, frames):
        self.pictures, self.num, self.alive, self.most = discs(1)[0], frames, 0, 0
        self.path = self.name = "alive"
        (self.height, self.width), self.fps = SIZE, Fraction(24)

    @property
    def num_frames(self):
        return self.num

    def check(self):
        pass

    def _pick(self, indices):
        raise NotImplementedError

    def _gone(self):
        self.alive -= 1

    def _stream(self, size):
        for _ in range(self.num):
            frame = self.pictures[0].copy()
            weakref.finalize(frame, self._gone)
            self.alive += 1
            self.most = max(self.most, self.alive)
            yield frame


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_folder_and_first_mask_become_a_folder_of_masks(clip, tmp_path, capsys):
    folder, first, ids = clip
    fine = ("--backbone", "efficientnet-lite0", "--frame-size", 192, 320, "--top-k", 3, "--temperature", 0.05)
    assert run(folder, "--mask", first, "--out", tmp_path / "out", *fine) == 0
    maps = read_annotations(tmp_path / "out", "walk")
    np.testing.assert_array_equal(maps[0], ids[0])
    assert np.unique(maps).tolist() == [0, 3, 200]
    for number in (3, 200):  # it moved by more than its diameter, so a copy of the first mask does not overlap it
        assert iou(maps[-1] == number, ids[-1] == number) > 0.5
        assert iou(ids[0] == number, ids[-1] == number) == 0
    printed = capsys.readouterr().out
    assert "walk: 6 frames of 48x80" in printed
    assert "object 200: in 6 of 6 frames" in printed
    for name in ("Annotations/walk", "overlays/walk.mp4", "previews/walk.png", "propagation.json"):
        assert str(tmp_path / "out" / name) in printed
        assert (tmp_path / "out" / name).exists()
    overlay = next(open_video(tmp_path / "out/overlays/walk.mp4").frames())
    away = ids[0] == 0
    away[:, :40] = False  # H.264 blurs the colours of the discs a little beyond their edge
    assert np.abs(overlay.astype(int) - discs(1)[0][0])[away].max() < 12  # the background is not tinted
    record = json.loads((tmp_path / "out/propagation.json").read_text())
    assert record["backbone"]["backbone"] == "efficientnet-lite0"
    assert record["propagation"]["top_k"] == 3


def test_python_yields_what_the_command_writes(clip, tmp_path):
    folder, first, ids = clip
    how = Propagation(top_k=3, context=2, radius=2, temperature=0.1, upsample=2)
    options = ("--top-k", 3, "--context", 2, "--radius", 2, "--temperature", 0.1, "--upsample", 2, "--edges", "guided")
    run(folder, "--mask", first, "--out", tmp_path / "out", *BACKBONE, *options)
    expected = read_annotations(tmp_path / "out", "walk")
    for mask in (first, ids[0]):
        maps = propagate_video(
            folder, mask, backbone="efficientnet-lite0", frame_size=(64, 96), how=how, edges="guided"
        )
        np.testing.assert_array_equal(np.stack(list(maps)), expected)


@pytest.mark.parametrize("edges", ["none", "guided"])
def test_streamed_masks_are_those_of_the_whole_video(tmp_path, edges):
    """19 frames, so that chunks of frames meet, by the parts that label propagation is made of."""
    pictures, ids = discs(19)
    video = open_video(save_frames(tmp_path / "walk", pictures, "{:05d}.png"))
    mask, how, backbone = first_mask(ids[0], "x"), Propagation(top_k=3, radius=3), Colours()
    encoder = Encoder(backbone, "fp32", None, "colours")
    streamed = list(propagated(video, mask, encoder, how, edges))
    np.testing.assert_array_equal(np.stack([frame for frame, _ in streamed]), pictures)
    features, grid = backbone.features(torch.from_numpy(pictures)), (12, 20)
    labels = patch_labels(torch.from_numpy(ids[0]), torch.tensor([0, 3, 200]), grid)
    carried = LabelPropagation(features[0], labels, grid, how)
    soft = torch.stack([carried.step(frame) for frame in features[1:]])
    maps = Segmentation(grid, soft).label_maps(SIZE, pictures[1:] if edges == "guided" else None)
    expected = [ids[0], *(np.array([0, 3, 200], np.uint8)[one.labels] for one in maps)]
    np.testing.assert_array_equal(np.stack([one for _, one in streamed]), np.stack(expected))


def test_video_of_one_frame_keeps_its_mask(tmp_path):
    pictures, ids = discs(1)
    write_palette_png(ids[0], tmp_path / "first.png")
    folder = save_frames(tmp_path / "still", pictures, "{:05d}.png")
    run(folder, "--mask", tmp_path / "first.png", "--out", tmp_path / "out", *BACKBONE)
    np.testing.assert_array_equal(read_annotations(tmp_path / "out", "still"), ids)


def test_memory_holds_a_few_frames():
    video = Alive(50)
    encoder = Encoder(Colours(), "fp32", None, "colours")
    stream = propagated(video, first_mask(discs(1)[1][0], "x"), encoder, Propagation(context=2), "guided")
    assert sum(1 for _ in stream) == 50
    assert video.most <= 17  # two chunks of eight, and one that a variable of the loop still references


def test_run_gives_the_features_of_its_backbone(clip, tmp_path, tiny_run):
    folder, first, _ = clip
    run(folder, "--mask", first, "--out", tmp_path / "a", "--run", tiny_run)
    run(folder, "--mask", first, "--out", tmp_path / "b", *BACKBONE)
    np.testing.assert_array_equal(read_annotations(tmp_path / "a", "walk"), read_annotations(tmp_path / "b", "walk"))


def test_frame_size_is_that_of_the_video_in_whole_patches():
    encoder = Encoder(Colours(), "fp32", None, "colours")
    video = Alive(1)
    assert encoder.size(video) == SIZE
    for own, expected in (((50, 79), (48, 80)), ((960, 1920), (480, 960)), ((1080, 607), (856, 480)), ((1, 9), (4, 8))):
        video.height, video.width = own
        assert encoder.size(video) == expected
    assert Encoder(Colours(), "fp32", (8, 12), "colours").size(video) == (8, 12)


def test_white_mask_is_one_object_and_void_is_background(clip, tmp_path):
    folder, _, ids = clip
    white, void = tmp_path / "white.png", tmp_path / "void.png"
    Image.fromarray(255 * (ids[0] == 3).astype(np.uint8)).save(white)
    Image.fromarray(np.where(ids[0] == 200, 255, ids[0] // 3).astype(np.uint8)).save(void)
    for mask in (white, void):
        run(folder, "--mask", mask, "--out", tmp_path / "out", *BACKBONE)
        np.testing.assert_array_equal(read_annotations(tmp_path / "out", "walk")[0], ids[0] == 3)


def test_data_set_is_scored_as_evaluate_scores_its_masks(scenes, tmp_path, capsys):
    out = tmp_path / "out"
    data = ("--data", "synthetic", "--root", scenes, "--split", "val", "--num-videos", 2)
    run(*data, "--out", out, "--backbone", "efficientnet-lite0", "--frame-size", 128, 192)
    report = json.loads((out / "evaluation/scores.json").read_text())
    rows = {row["method"]: row for row in report["results"]}
    assert {row["protocol"] for row in report["results"]} == {"davis-2017"}
    propagated_row, copied = rows["propagated, efficientnet-lite0"], rows["copies of the first mask"]
    assert propagated_row["mean"]["jf"] > copied["mean"]["jf"] + 0.1
    assert (copied["kind"], report["split"], report["skipped"]) == ("baseline", "val", [])
    truths = [dataset.masks(i) for dataset in [open_dataset("synthetic", scenes, "val")] for i in range(2)]
    copies = [score_video(PROTOCOLS["davis-2017"], np.repeat(m[:1], len(m), 0), m, background=0)["jf"] for m in truths]
    assert copied["mean"]["jf"] == pytest.approx(np.mean(np.concatenate(copies)), abs=1e-12)
    assert "copies of the first mask" in capsys.readouterr().out
    assert sorted(path.name for path in (out / "previews").iterdir()) == [f"{name}.png" for name in report["frames"]]
    masks = ("--masks", out / "Annotations", *data, "--protocol", "davis-2017", "--out", tmp_path / "again")
    assert evaluate.main([str(argument) for argument in masks]) == 0
    again = json.loads((tmp_path / "again/scores.json").read_text())["results"]
    assert [row["mean"] for row in again] == [propagated_row["mean"]]


def save_davis(root, year, annotations, videos):
    for name, (pictures, ids) in videos.items():
        save_frames(root / "JPEGImages/480p" / name, pictures, "{:05d}.png")
        for t, mask in enumerate(ids):
            write_palette_png(mask, root / annotations / "480p" / name / f"{t:05d}.png")
    (root / "ImageSets" / year).mkdir(parents=True)
    (root / "ImageSets" / year / "val.txt").write_text("\n".join(videos) + "\n")
    return root


@pytest.mark.parametrize(("year", "protocols"), [("2016", ["davis-2017", "davis-2016"]), ("2017", ["davis-2017"])])
def test_davis_has_its_protocols(tmp_path, year, protocols):
    pictures, ids = discs()
    root = save_davis(tmp_path / "davis", year, "Annotations", {"walk": (pictures, ids // 3 % 65)})  # ids 0, 1, 2 or 1
    run("--data", "davis", "--root", root, "--year", year, "--out", tmp_path / "out", *BACKBONE, "--radius", 3)
    report = json.loads((tmp_path / "out/evaluation/scores.json").read_text())
    assert [row["protocol"] for row in report["results"]] == [name for name in protocols for _ in range(2)]
    assert report["data"] == f"davis-{year}"
    objects = {"2016": [1], "2017": [1, 66 % 65]}[year]
    assert np.unique(read_annotations(tmp_path / "out", "walk")).tolist() == [0, *sorted(set(objects))]


def test_videos_without_first_mask_are_named_and_left_out(tmp_path, capsys):
    root, (pictures, ids) = tmp_path / "data", discs()
    for name in ("a", "b"):
        save_frames(root / name, pictures, "{:05d}.png")
    for t in (0, 2):
        write_palette_png(ids[t], root / "masks/a" / f"{t:05d}.png")
    write_palette_png(ids[3], root / "masks/b/00003.png")
    run("--data", "folder", "--root", root, "--out", tmp_path / "out", *BACKBONE)
    printed = capsys.readouterr()
    assert f"left out: {root / 'b'}: no mask of its first frame, the first one with a mask is frame 3" in printed.err
    assert "nothing to score: the data set has no masks of later frames" in printed.out
    assert [path.name for path in (tmp_path / "out/Annotations").iterdir()] == ["a"]
    assert not (tmp_path / "out/evaluation").exists()
    shutil.rmtree(root / "masks/a")
    with pytest.raises(ValueError, match="no video has a usable mask of its first frame"):
        run("--data", "folder", "--root", root, "--out", tmp_path / "other", *BACKBONE)


def mistakes():
    """name -> (make(tmp_path, clip, run) -> the arguments, text of the error)."""

    def saved(mask, name="mask.png"):
        def make(path, clip, run):
            Image.fromarray(mask).save(path / name)
            return [clip[0], "--mask", path / name, "--out", path / "out", *BACKBONE]

        return make

    def given(*options):
        def make(path, clip, run):
            places = {"CLIP": clip[0], "MASK": clip[1], "OUT": path / "out", "RUN": run, "PATH": path}
            return [places.get(option, option) for option in options]

        return make

    def onto_masks(path, clip, run):
        (path / "Annotations/walk").mkdir(parents=True)
        return [clip[0], "--mask", clip[1], "--out", path, *BACKBONE]

    small, none = np.ones((8, 8), np.uint8), np.zeros(SIZE, np.uint8)
    clip_and_mask = ("CLIP", "--mask", "MASK", "--out", "OUT")
    return {
        "nothing": (given("--out", "OUT"), "give a CLIP with --mask PNG, or a data set with --data NAME --root DIR"),
        "no mask": (given("CLIP", "--out", "OUT"), "a CLIP needs --mask PNG"),
        "mask alone": (given("--mask", "MASK", "--out", "OUT"), "--mask needs a CLIP"),
        "clip and data": (given(*clip_and_mask, "--root", "PATH"), "leave out either --root or the CLIP"),
        "run and backbone": (given(*clip_and_mask, "--run", "RUN", "--feature-layer", "8"), "a run has its own"),
        "missing mask": (given("CLIP", "--mask", "no.png", "--out", "OUT", *BACKBONE), "--mask no.png: no such file"),
        "missing clip": (given("no.mp4", "--mask", "MASK", "--out", "OUT", *BACKBONE), "no such video file"),
        "missing run": (given(*clip_and_mask, "--run", "no-run"), "no run directory at no-run"),
        "missing backbone": (given(*clip_and_mask, "--backbone", "/no/vit.pth"), "no backbone weights at /no/vit.pth"),
        "size of the mask": (saved(small), "mask of 8x8 (height x width), but"),
        "empty mask": (saved(none), "has no object"),
        "colours": (saved(discs(1)[0][0]), "colours (RGB) instead of object ids"),
        "jpeg": (saved(discs(1)[1][0], "mask.jpg"), "whose compression changes object ids"),
        "frame size": (given(*clip_and_mask, *BACKBONE[:3], "60", "90"), "the nearest is --frame-size 64 96"),
        "top-k": (given(*clip_and_mask, *BACKBONE, "--top-k", "0"), "--top-k must be at least 1, got 0"),
        "alpha": (given(*clip_and_mask, *BACKBONE, "--alpha", "2"), "between 0 and 1"),
        "out is a file": (given(*clip_and_mask[:-1], "MASK", *BACKBONE), "is a file; give a directory"),
        "out holds annotations": (onto_masks, "already exists and is not from this command"),
        "out is the data set": (given("--root", "PATH", "--out", "PATH"), "is the data set itself"),
        "no data set": (given("--root", "PATH", "--out", "OUT", *BACKBONE), "so it is no DAVIS root"),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_mistakes_are_one_clear_line(tmp_path, clip, tiny_run, capsys, mistake):
    make, words = mistakes()[mistake]
    arguments = make(tmp_path, clip, tiny_run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: run(*arguments))
    assert left.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert words in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_clip_inside_its_own_output_is_refused(tmp_path):
    folder = make_folder(tmp_path / "Annotations/walk")
    with pytest.raises(ValueError, match="would overwrite"):
        run(folder, "--mask", tmp_path / "first.png", "--out", tmp_path, *BACKBONE)


def test_masks_in_memory_are_checked(clip):
    with pytest.raises(ValueError, match=r"mask must be uint8 \[48, 80\] like the video, got int64 \(48, 80\)"):
        propagate_video(clip[0], clip[2][0].astype(np.int64), backbone="efficientnet-lite0")
    with pytest.raises(ValueError, match="edges 'sharp': choose from guided, none"):
        propagate_video(clip[0], clip[2][0], edges="sharp")
