"""The report, its pictures, and the text that is written on them."""

import base64
import io
import re
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from interpreter.evaluation import provenance
from interpreter.evaluation.candidates import Entry
from interpreter.evaluation.gallery import Gallery, Picture
from interpreter.evaluation.record import Provenance
from interpreter.evaluation.report import write_report
from interpreter.evaluation.scoring import Scores
from interpreter.metrics import PROTOCOLS

HOSTILE = "<script>alert('x')</script>\"><img src=https://evil.example/x.png> $\\frac{"


class Page(HTMLParser):
    """The tags of a page, the files that they load, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text.append(data)


def numbers(protocol, value):
    return {name: [value] for name in protocol.metrics} | {"objects": 1.0, "frames": 5.0}


@pytest.fixture
def report(tmp_path):
    """The report of a run with two seeds, a sweep and a baseline, on videos with hostile names."""
    protocol = PROTOCOLS["slot-contrast"]
    scores = Scores([protocol], skipped=[(HOSTILE + "skipped", "cut " + HOSTILE)])
    video = SimpleNamespace(name=HOSTILE, num_frames=5)
    main, baseline = Entry("video stage", "main"), Entry(HOSTILE + "baseline", "baseline")
    swept = [Entry(f"merge {x}", "sweep", ("merge threshold", x)) for x in (0.1, 0.2)]
    seeds = {0: 0.25, 1: 0.75}
    by_setting = {(protocol.name, m, s): numbers(protocol, v) for m in (main, *swept) for s, v in seeds.items()}
    scores.add(video, by_setting | {(protocol.name, baseline, None): numbers(protocol, float("nan"))})
    picture = Picture("best 1", HOSTILE, 0.25, np.zeros((20, 30, 3), np.uint8))
    stamp = Provenance("davis-2017", "val", HOSTILE + "subject", "abc1234-dirty")
    write_report(tmp_path / "report.html", scores, stamp, {"root": HOSTILE}, [picture])
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_loads_nothing_from_elsewhere(report):
    page = Page(report)
    assert page.loaded
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in page.loaded)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in report
    assert "@import" not in report
    assert "default-src 'none'" in report
    for source in page.loaded:
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).verify()


def test_hostile_names_are_text(report):
    text = "".join(Page(report).text)
    for name in (HOSTILE + "skipped", "cut " + HOSTILE, HOSTILE + "baseline", HOSTILE + "subject"):
        assert name in text
    assert "<script" not in report
    assert "<img src=https" not in report


def test_report_holds_numbers_with_protocol_split_and_commit(report):
    text = re.sub(r"\s+", " ", "".join(Page(report).text))
    assert "0.500 ± 0.354" in text  # mean and sample standard deviation of 0.25 and 0.75
    assert "protocol slot-contrast · split val · commit abc1234-dirty" in text
    assert PROTOCOLS["slot-contrast"].not_comparable in text
    assert report.count("data:image/png") == 4  # two metrics against the threshold, sorted scores, identity switches


def seen(gallery, scores):
    """Show a gallery one video for each score."""
    truth = np.zeros((2, 4, 6), np.uint8)
    for number, score in enumerate(scores):
        video = SimpleNamespace(name=f"../{number}/<x>", width=6, height=4, num_frames=2)
        video.read = lambda chosen, size: np.zeros((len(chosen), *size, 3), np.uint8)
        gallery.see(video, Entry("masks", "main"), truth + np.uint16(300), truth, np.arange(2))
        gallery.keep(score)
    return gallery.pictures()


def test_best_and_worst_videos_are_kept_in_order():
    pictures = seen(Gallery(2), [0.5, 0.9, 0.1, float("nan"), 0.6, 0.3, 0.8])
    assert [(p.rank, p.score) for p in pictures] == [
        ("best 1", 0.9),
        ("best 2", 0.8),
        ("worst 1", 0.1),
        ("worst 2", 0.3),
    ]
    pictures = seen(Gallery(3), [0.2, 0.4, 0.3])  # no video is both best and worst
    assert [(p.rank, p.score) for p in pictures] == [("best 1", 0.4), ("best 2", 0.3), ("worst 1", 0.2)]


def test_gallery_holds_no_more_than_it_shows():
    gallery = Gallery(2)
    seen(gallery, np.linspace(0, 1, 50))
    assert len(gallery._kept) == 4


def test_pixels_in_no_segment_are_not_painted():
    truth = np.zeros((1, 4, 6), np.uint8)
    truth[:, :, 3:] = 1
    video = SimpleNamespace(name="walk", width=6, height=4, num_frames=1)
    video.read = lambda chosen, size: np.full((len(chosen), *size, 3), 100, np.uint8)
    unpainted = {}
    for background in (None, 0):
        gallery = Gallery(1)
        gallery.see(video, Entry("masks", "main"), 7 * truth, truth, np.zeros(1, int), background)
        gallery.keep(1.0)
        image = gallery.pictures()[0].image
        row = image[len(image) // 2]  # with the masks, between input and truth
        unpainted[background] = (row == 100).all(1).mean()
    assert unpainted[None] == 0
    assert unpainted[0] == pytest.approx(0.5, abs=0.05)  # the left half of each frame


def test_pictures_stay_in_their_folder(tmp_path):
    for picture in seen(Gallery(1), [0.1, 0.2]):
        picture.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best-1-.._1_x_.png", "worst-1-.._0_x_.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit_is_that_of_the_checkout_alone(tmp_path, monkeypatch):
    package = tmp_path / "interpreter"
    package.mkdir()
    (package / "__init__.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(provenance, "__file__", str(package / "evaluation/provenance.py"))
    commit = provenance.code_version()
    assert re.fullmatch(r"[0-9a-f]{7,}", commit)
    (package / "__init__.py").write_text("# changed")
    assert provenance.code_version() == f"{commit}-dirty"

    inner = tmp_path / "venv/site-packages/interpreter"
    inner.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(inner / "evaluation/provenance.py"))
    assert not re.search(commit, provenance.code_version())
