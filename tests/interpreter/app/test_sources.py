"""The runs and methods that the page offers, and the sliders of each method."""

import shutil

import pytest

from interpreter.app.sources import NAMES, Sources, checked, controls
from interpreter.configs import BackboneConfig
from interpreter.methods import METHODS, cluster

SMALL = BackboneConfig("efficientnet-lite0")
TRAINED: dict[str, dict] = {
    "image": {"image": {}},
    "video": {"image": {}, "video": {}},
    "levels": {"image": {}, "video": {}, "video-3": {}, "video-4": {}},
}


@pytest.fixture
def sources(tiny_run, monkeypatch):
    monkeypatch.setattr(cluster, "FRAME_SIZE", (64, 96))
    return Sources([tiny_run], SMALL)


def names(method, stages, **settings):
    return [control["name"] for control in controls(METHODS[method], stages, None, settings)]


@pytest.mark.parametrize(
    ("method", "stages", "settings", "expected"),
    [
        ("cluster", {}, {}, ["num_segments"]),
        ("interpreter", TRAINED["image"], {}, ["level", "num_slots"]),
        ("interpreter", TRAINED["image"], {"level": 1}, ["level"]),
        ("interpreter", TRAINED["video"], {}, ["association", "level", "num_slots"]),
        ("interpreter", TRAINED["video"], {"association": "features"}, ["association", "level", "num_slots"]),
        (
            "interpreter",
            TRAINED["video"],
            {"association": "learned"},
            ["association", "level", "num_slots", "merge_threshold"],
        ),
        ("interpreter", TRAINED["video"], {"association": "learned", "level": 1}, ["association", "level"]),
        ("interpreter", TRAINED["levels"], {}, ["association", "levels", "level", "num_slots"]),
        (
            "interpreter",
            TRAINED["levels"],
            {"levels": 3},
            ["association", "levels", "level", "num_slots", "merge_threshold"],
        ),
        ("interpreter", TRAINED["levels"], {"levels": 3, "level": 2}, ["association", "levels", "level"]),
        ("solv", {"model": {}}, {}, ["num_slots", "merge_threshold"]),
    ],
)
def test_sliders_are_those_of_method_and_stages(method, stages, settings, expected):
    assert names(method, stages, **settings) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_slider_is_a_setting_of_its_method(method):
    for stages in ({}, *TRAINED.values()):
        for control in controls(METHODS[method], stages, None, {}):
            assert control["name"] in NAMES
            assert control["name"] in METHODS[method].settings.__dataclass_fields__
            assert control["label"]
            assert control["help"].endswith(".")


def test_choices_are_those_that_are_trained():
    shown = {c["name"]: c for c in controls(METHODS["interpreter"], TRAINED["levels"], None, {"levels": 3})}
    assert [c["value"] for c in shown["association"]["choices"]] == ["features", "learned"]
    assert [c["value"] for c in shown["levels"]["choices"]] == [2, 3, 4]
    assert [c["value"] for c in shown["level"]["choices"]] == [1, 2, 3]
    assert (shown["levels"]["value"], shown["levels"]["default"], shown["level"]["default"]) == (3, 2, 3)
    assert [name for name, c in shown.items() if c["slow"]] == ["association", "levels"]
    slider = shown["num_slots"]
    assert (slider["kind"], slider["min"], slider["max"], slider["step"]) == ("range", 1, 30, 1)
    assert (shown["merge_threshold"]["min"], shown["merge_threshold"]["max"]) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "first", "rest"),
    [
        ({}, {}, {}),
        ({"num_slots": None, "level": None}, {}, {}),
        ({"num_slots": 5}, {}, {"num_slots": 5}),
        ({"num_slots": 5.0}, {}, {"num_slots": 5}),
        ({"level": 1, "num_slots": 5}, {}, {"level": 1}),
        ({"merge_threshold": 0.2, "num_slots": 3}, {}, {"num_slots": 3}),
        ({"merge_threshold": 0.2, "association": "learned"}, {"association": "learned"}, {"merge_threshold": 0.2}),
        ({"levels": 3}, {}, {}),
    ],
)
def test_settings_without_a_slider_are_left_out(sources, settings, first, rest):
    choice = sources.choose(sources["run-0"], settings)
    assert (choice.first, choice.settings) == (first, rest)
    assert all(type(value) is type(rest[name]) for name, value in choice.settings.items())
    segmenter = sources.open(choice)
    kept = {c["name"]: c["value"] for c in sources.controls(choice, segmenter)}
    assert {name: value for name, value in kept.items() if value is not None} == first | rest


def test_default_number_is_that_of_the_opened_model(sources):
    for id, settings in (("run-0", {}), ("run-0", {"association": "learned"}), ("cluster", {})):
        choice = sources.choose(sources[id], settings)
        segmenter = sources.open(choice)
        (slider,) = [c for c in sources.controls(choice, segmenter) if c["name"] in ("num_slots", "num_segments")]
        assert slider["default"] == segmenter.num_segments
        assert slider["value"] is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed": 1}, "no setting is called 'seed'"),
        ({"num_slots": 0}, "Number of segments: 0"),
        ({"num_slots": 31}, "Number of segments: 31"),
        ({"num_slots": float("nan")}, "Number of segments: nan"),
        ({"num_slots": "auto"}, "Number of segments: 'auto'"),
        ({"num_slots": True}, "Number of segments: True"),
        ({"level": 3}, "Level: 3"),
        ({"level": True}, "Level: True"),
        ({"association": "none"}, "Grouping over time: 'none'"),
    ],
)
def test_value_of_no_slider_is_refused(sources, settings, says):
    with pytest.raises(ValueError, match=says):
        sources.choose(sources["run-0"], settings)


def test_values_at_both_ends_of_a_slider_are_taken():
    shown = controls(METHODS["solv"], {"model": {}}, None, {})
    for values in ({"num_slots": 1, "merge_threshold": 0}, {"num_slots": 30, "merge_threshold": 1}):
        assert checked(shown, values) == values
    with pytest.raises(ValueError, match=r"Merge threshold: 1\.01"):
        checked(shown, {"merge_threshold": 1.01})


def test_models_are_kept_open(sources, tiny_run):
    choice, other = (sources.choose(sources[id], {}) for id in ("run-0", "cluster"))
    opened = sources.open(choice)
    assert sources.open(sources.choose(sources["run-0"], {"num_slots": 3})) is opened
    assert sources.open(other) is not opened
    learned = sources.choose(sources["run-0"], {"association": "learned"})
    assert learned.key != choice.key
    assert sources.open(learned) is not opened
    assert sources.open(other) is sources.open(other)
    assert sources.open(choice) is not opened  # two are kept


def test_run_can_segment_once_it_has_a_checkpoint(tiny_run, tmp_path):
    run = tmp_path / "later"
    sources = Sources([run, tiny_run], SMALL)
    assert [source.id for source in sources.usable()] == ["run-1", "cluster"]
    with pytest.raises(ValueError, match="run-0"):
        sources["run-0"]
    shutil.copytree(tiny_run, run)
    assert [source.id for source in sources.usable()] == ["run-0", "run-1", "cluster"]
    about = {
        "id": "run-0",
        "label": str(run),
        "method": "interpreter",
        "detail": "method interpreter, trained stages: image, video",
    }
    assert sources["run-0"].describe() == about
