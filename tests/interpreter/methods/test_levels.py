"""A third level from the command line: training, cache, resuming, compiling, segmenting."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from interpreter.cache import main as cache
from interpreter.configs import OptimConfig
from interpreter.data import open_video
from interpreter.data.frame_index import FrameIndex
from interpreter.engine.distributed import Ranks
from interpreter.engine.inputs import InputSettings
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import VideoModelConfig, VideoTraining
from interpreter.methods.interpreter.hierarchy import Slots, propagate
from interpreter.methods.interpreter.level_slots import LevelClips
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.stages import VideoTrainingStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.runs import open_segmenter
from interpreter.segment import main as segment
from interpreter.train import main as train

from ..runs import curve

LEVEL = ["--level", "3", "--window", "5", "--overlap", "2", "--num-frames", "9"]
MEANS = ["--inputs", "means", "--decoder", "masks", "--encoder-layers", "0", "--merge-threshold", "0"]


@pytest.fixture(scope="module")
def level_options(video_options):
    """Options of a tiny third level, all but --run: windows of 5 frames that overlap by 2, 8 of them in 24 frames."""
    return [*video_options, *LEVEL]


@pytest.fixture(scope="module")
def level_run(tmp_path_factory, tiny_run, level_options):
    """A run with three trained levels."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("levels") / "run")
    train(["--run", str(run), *level_options])
    return run


@pytest.fixture
def clip(scenes):
    return open_video(scenes / "JPEGImages" / "480p" / "train-00000")


def test_a_level_is_kept_by_itself_and_knows_what_it_was_trained_on(level_run):
    config = json.loads((level_run / "config.json").read_text())
    assert list(config["stages"]) == ["image", "video", "video-3"]
    assert list(config["trained_on"]) == ["video", "video-3"]
    assert [record["step"] for record in curve(level_run, "video-3")] == [1, 2, 3]


def test_a_missing_level_names_the_command_that_makes_it(tiny_run, level_options):
    with pytest.raises(FileNotFoundError, match=r"no trained video-3 stage.* --stage video --level 3 --run"):
        train(["--run", str(tiny_run), *level_options, "--level", "4"])
    with pytest.raises(FileNotFoundError, match=r"no trained video-3 stage.* --stage video --level 3 --run"):
        open_segmenter(INTERPRETER, tiny_run, Settings(level=3))


def test_a_level_refuses_to_stand_on_another_one(level_run, video_options, tmp_path):
    run = shutil.copytree(level_run, tmp_path / "run")
    shutil.rmtree(run / "video")
    train(["--run", str(run), *video_options, "--seed", "1"])
    with pytest.raises(ValueError, match=r"the video-3 stage of .* was trained on another video stage"):
        open_segmenter(INTERPRETER, run, Settings(level=3))


def test_stored_windows_are_those_of_the_stages(level_run, scenes, clip):
    """The cache contains the slots of level 2 in windows of 5 frames, with masses that sum to 1."""
    (store,) = (path for path in (level_run / "cache").glob("level-2-*") if not _flipped(path))
    files = [load_file(path) for path in store.glob("*.safetensors")]
    assert len(files) == 3
    for tensors in files:
        assert tensors["slots"].shape == (8, 4, 3, 16)  # windows, draws, slots, width
        torch.testing.assert_close(tensors["masses"].float().sum(2), torch.ones(8, 4), atol=2e-3, rtol=0)
    recipe = json.loads((store / "recipe.json").read_text())
    assert [(level["window"], level["overlap"]) for level in recipe["levels"]] == [(5, 2)]


def _flipped(store):
    return json.loads((store / "recipe.json").read_text())["flip"]


def test_the_cache_command_computes_the_same_files(level_run, level_options, tmp_path):
    run = shutil.copytree(level_run, tmp_path / "run", ignore=shutil.ignore_patterns("level-2-*"))
    cache(["--run", str(run), "--stage", "video-3"])
    before = sorted((level_run / "cache").glob("level-2-*/*.safetensors"))
    after = sorted((run / "cache").glob("level-2-*/*.safetensors"))
    assert len(after) == 6
    for one, other in zip(before, after, strict=True):
        assert one.relative_to(level_run) == other.relative_to(run)
        assert one.read_bytes() == other.read_bytes()


def test_streamed_slots_of_windows_are_refused(tiny_run, level_options, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(ValueError, match="--features streamed: a level above 2 trains on the stored slots"):
        train(["--run", str(run), *level_options, "--features", "streamed"])


@pytest.mark.parametrize("extra", [[], MEANS])
def test_a_stopped_level_resumes_bit_for_bit(tiny_run, means_level_below, level_options, tmp_path, extra):
    below = means_level_below if extra == MEANS else tiny_run
    runs = [shutil.copytree(below, tmp_path / name) for name in ("straight", "stopped")]
    options = [*level_options, *extra, "--steps", "8", "--checkpoint-every", "4"]
    train(["--run", str(runs[0]), *options])
    train(["--run", str(runs[1]), *options])
    (runs[1] / "video-3" / "checkpoint-00000008.safetensors").unlink()
    train(["--run", str(runs[1]), *options])  # from step 4
    weights = [load_file(run / "video-3" / "checkpoint-00000008.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def means_level_below(tmp_path_factory, tiny_run, video_options):
    """A run whose video stage reads means."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("means") / "run", ignore=shutil.ignore_patterns("video"))
    train(["--run", str(run), *video_options, *MEANS])
    return run


def test_a_compiled_level_learns_the_same(tiny_run, level_run, level_options, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    train(["--run", str(run), *level_options, "--compile"])
    losses = [[record["loss"] for record in curve(r, "video-3")] for r in (run, level_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_segments_of_the_top_level_are_the_propagated_ones(level_run, clip):
    segmenter = open_segmenter(INTERPRETER, level_run, Settings(level=3))
    encoded = segmenter.encode(clip)
    segmentation = segmenter.segment(encoded)
    levels = segmenter.find_levels(encoded.by_seed[0], 0, segmenter.settings)
    count = int(levels[1].valid.sum())
    assert segmentation.tied_over_time
    assert segmentation.num_segments == count
    torch.testing.assert_close(segmentation.across, propagate(levels, 24)[..., :count])
    masks = segmentation.masks()
    torch.testing.assert_close(masks.sum(2), torch.ones(masks.shape[:2]), atol=2e-3, rtol=0)


def test_segment_writes_a_level_its_hierarchy_and_outlines(level_run, clip, tmp_path):
    out = tmp_path / "out"
    segment([str(clip.path), "--run", str(level_run), "--out", str(out), "--level", "3", "--outlines", "2"])
    described = json.loads((out / "hierarchy.json").read_text())
    assert described["format"] == 1
    low, top = described["levels"]
    assert [window["frames"] for window in low["windows"]][:2] == [[0, 4], [3, 7]]
    assert [window["frames"] for window in top["windows"]] == [[0, 23]]
    segments = {segment["segment"] for segment in top["windows"][0]["segments"]}
    assert {s["part_of"]["segment"] for window in low["windows"] for s in window["segments"]} <= segments
    seen = {int(i) for path in (out / "Annotations" / clip.name).glob("*.png") for i in np.unique(Image.open(path))}
    assert seen <= segments
    tensors = load_file(out / "slots.safetensors")
    assert tensors["level_2_attention"].shape[:3] == (8, 5, 4)
    assert tensors["video_attention"].shape[:2] == (24, 4)

    # Two levels have no such file, and the file of the earlier call is removed.
    segment([str(clip.path), "--run", str(level_run), "--out", str(out), "--association", "learned"])
    assert not (out / "hierarchy.json").exists()


def test_a_lower_level_numbers_segments_in_each_window(level_run, clip, capsys, tmp_path):
    out = tmp_path / "out"
    segment([str(clip.path), "--run", str(level_run), "--out", str(out), "--level", "2", "--levels", "3"])
    assert "a number means a different object in every window" in " ".join(capsys.readouterr().out.split())


def test_slots_of_a_stage_that_reads_means_come_from_half_precision(means_level_below, level_options, clip, tmp_path):
    run = shutil.copytree(means_level_below, tmp_path / "run")
    train(["--run", str(run), *level_options, *MEANS])
    segmenter = open_segmenter(INTERPRETER, run, Settings(level=3))
    encoded = segmenter.encode(clip).by_seed[0]
    assert encoded.slots.dtype == encoded.described.features.dtype == torch.float16
    levels = segmenter.find_levels(encoded, 0, segmenter.settings)
    assert isinstance(levels[0].slots, Slots)
    assert levels[0].slots.means.shape[-1] == segmenter.backbone.dim + 2


def test_a_level_that_reads_means_starts_from_the_weights_below():
    model = VideoModelConfig(
        dim=16, heads=2, inputs="means", decoder="masks", encoder_layers=0, merge_threshold=0.0, num_slots=3
    )
    config = VideoTraining(run=Path("run"), model=model)
    below = VideoStage(model, 10, 4)
    image, video = SimpleNamespace(model=SimpleNamespace(feature_dim=8)), SimpleNamespace(model=below, config=config)
    context = SimpleNamespace(earlier={"image": image, "video": video})

    def starts_from_below(**options):
        built = VideoTrainingStage().build(replace(config, level=3, **options), context)
        return torch.equal(built.decoder.weight, below.decoder.weight) if built.config.dim == 16 else False

    assert starts_from_below()
    assert not starts_from_below(start="random")
    assert not starts_from_below(model=replace(model, inputs="slots"))
    assert not starts_from_below(model=replace(model, dim=32))  # the level below has no such sizes


@pytest.mark.parametrize("masked", [True, False])
def test_windows_that_a_short_video_lacks_have_no_mass(masked):
    """Videos of 3 and 8 windows, in clips of 5: a row is its window's number, and every slot has mass 1."""

    class Table:
        index, digests = FrameIndex([3, 8]), ("short", "long")

        def rows(self, name, windows, flips, draws):
            return torch.ones(len(windows), 2) if name == "masses" else windows[:, None, None].expand(-1, 2, 4).float()

    settings = InputSettings(None, OptimConfig(steps=4, batch_size=2), Ranks())
    clips = LevelClips(Table(), torch.device("cpu"), 5, 1, "slots", (2, 4), settings, masked)
    for inputs, masses in clips.batches(range(4)):
        short = (inputs[:, 0, 0, 0] < 3).tolist()
        assert sorted(short) == [False, True]
        for row, is_short in enumerate(short):
            assert masses[row, :, 0].tolist() == ([1, 1, 1, 0, 0] if masked and is_short else [1] * 5)
        assert [tuple(t.shape) for t in (inputs, masses)] == clips.shapes(2)
