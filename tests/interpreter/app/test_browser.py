"""The page in a real browser, as a user sees it."""

import base64
import io
import json
import os
import re
import shutil
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from interpreter import segment
from interpreter.app import corrections
from interpreter.app.corrections import uncorrected
from interpreter.app.session import Session
from interpreter.render import DISPLAY_PALETTE
from interpreter.segmentation import SegmentedVideo

from ..clips import make_clip, read_annotations
from .client import wait_for

expect.set_options(timeout=30_000)  # two test processes share two cores
SIZE = (96, 128)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium():
    """A headless browser of the system. It is closed after this file, because Playwright has an event loop."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        message = f"no Chromium is installed ({', '.join(BROWSERS)}); on Debian: apt install chromium"
        if os.environ.get("INTERPRETER_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    # As root, as in containers, Chromium starts only without its sandbox. It opens no page but this server's.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """open_page(server, **options) -> the page of a server in a new window; its console must stay empty.

    A page's ``problems`` are what its console shows; a test that causes some takes them out.
    """
    contexts, pages = [], []

    def make(server, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        pages.append(page)
        page.goto(server.address)
        page.get_by_label("Segment with").locator("option").first.wait_for(state="attached")
        return page

    yield make
    problems = [problem for page in pages for problem in page.problems]
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A clip that the page shows pixel by pixel."""
    return make_clip(tmp_path_factory.mktemp("browser") / "disc.mp4", frames=6, size=SIZE)


@pytest.fixture(scope="session")
def command_line(clip, tiny_run, tmp_path_factory):
    """The folder that `interpreter.segment` writes for that clip."""
    out = tmp_path_factory.mktemp("out")
    segment.main([str(clip), "--run", str(tiny_run), "--out", str(out)])
    return out


def segment_clip(page, clip, source="run-0"):
    """Choose the clip, segment it, and wait for the list of segments."""
    page.locator("#file").set_input_files(clip)
    expect(page.get_by_text(re.compile(rf"{clip.name}: \d+ frames"))).to_be_visible()
    page.get_by_label("Segment with").select_option(source)
    page.get_by_role("button", name="Segment", exact=True).click()
    rows(page).first.wait_for()


def rows(page):
    return page.get_by_role("list", name="Segments").get_by_role("listitem")


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def canvas(page, name="Segments"):
    return page.get_by_role("img", name=name, exact=True)


def pixels(page, name="Segments"):
    """What a canvas shows, uint8 [H, W, 3]."""
    url = canvas(page, name).evaluate("canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def click_pixel(page, row, column, **options):
    """Click on a pixel of the picture with the segments."""
    expect(canvas(page)).to_have_attribute("data-version", re.compile(r"\d"))
    box = canvas(page).bounding_box()
    place = {"x": (column + 0.5) * box["width"] / SIZE[1], "y": (row + 0.5) * box["height"] / SIZE[0]}
    canvas(page).click(position=place, **options)


def download(page, name):
    """The file that a button of the page saves."""
    with page.expect_download() as saved:
        button(page, name).click()
    return saved.value


def masks_of(saved):
    """Label maps uint8 [T, H, W] of a ZIP of palette PNGs."""
    with zipfile.ZipFile(saved.path()) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        return np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names])


def largest(labels, count=2):
    """The numbers of the largest segments, and a pixel inside of each."""
    numbers, sizes = np.unique(labels, return_counts=True)
    chosen = numbers[np.argsort(-sizes)[:count]].tolist()
    inside = []
    for number in chosen:
        places = np.argwhere(labels == number)
        inside.append(places[np.square(places - places.mean(0)).sum(1).argmin()].tolist())
    return list(zip(chosen, inside, strict=True))


def test_masks_of_the_page_are_those_of_the_command_line(open_page, server, clip, command_line):
    page = open_page(server)
    segment_clip(page, clip)
    saved = download(page, "PNG masks (zip)")
    assert saved.suggested_filename == "disc-masks.zip"
    with zipfile.ZipFile(saved.path()) as archive:
        for name in archive.namelist():
            assert archive.read(name) == (command_line / name).read_bytes()
    np.testing.assert_array_equal(masks_of(saved), read_annotations(command_line, "disc"))
    entries = json.loads(download(page, "RLE (JSON)").path().read_text())
    assert entries == json.loads((command_line / "segments.json").read_text())
    assert download(page, "Overlay (MP4)").path().read_bytes() == (command_line / "overlay.mp4").read_bytes()


def test_clicked_segments_are_merged_named_hidden_and_saved(open_page, server, clip, tiny_run, command_line):
    page = open_page(server)
    segment_clip(page, clip)
    before = read_annotations(command_line, "disc")
    (one, inside), (other, beside) = largest(before[0])
    click_pixel(page, *inside)
    expect(page.get_by_text(f"1 segment selected: segment {one}.")).to_be_visible()
    click_pixel(page, *beside, modifiers=["Shift"])
    expect(page.get_by_text("2 segments selected")).to_be_visible()
    count = rows(page).count()
    button(page, "Merge").click()
    expect(rows(page)).to_have_count(count - 1)
    expect(page.get_by_text(f"1 segment selected: segment {min(one, other)}.")).to_be_visible()
    page.get_by_label("Name", exact=True).fill("the <b>ground</b>")
    page.keyboard.press("Enter")
    expect(rows(page).filter(has_text="the <b>ground</b>")).to_have_count(1)  # as text
    hidden = next(number for number in np.unique(before).tolist() if number not in (one, other))
    button(page, f"Hide segment {hidden}").click()
    expect(button(page, f"Show segment {hidden}")).to_be_visible()

    result = segment.segment_video(clip, tiny_run)
    expected = corrections.merge(uncorrected(result.segmentation), [one, other])
    numbers = np.array([0 if id == hidden else id for id in expected.ids])
    labels = np.stack(list(SegmentedVideo(result.video, expected.segmentation).labels()))
    np.testing.assert_array_equal(masks_of(download(page, "PNG masks (zip)")), numbers[labels])
    entries = json.loads(download(page, "RLE (JSON)").path().read_text())
    assert [entry.get("name") for entry in entries].count("the <b>ground</b>") == 1
    assert len(entries) == len(set(np.unique(numbers[labels])) - {0})

    for _ in range(3):
        button(page, "Undo").click()
    expect(rows(page)).to_have_count(count)
    expect(button(page, "Undo")).to_be_disabled()
    np.testing.assert_array_equal(masks_of(download(page, "PNG masks (zip)")), before)


def test_the_overlay_tints_every_segment_of_the_frame(open_page, server, clip, command_line):
    page = open_page(server)
    segment_clip(page, clip)
    slider = page.get_by_role("slider", name="Frame")
    slider.fill("4")
    expect(page.get_by_text("frame 5 of 6")).to_be_visible()
    labels = read_annotations(command_line, "disc")[4]
    inner = np.ones(SIZE, bool)
    inner[[0, -1]] = inner[:, [0, -1]] = False
    for axis in (0, 1):
        for shift in (-1, 1):
            inner &= np.roll(labels, shift, axis) == labels

    def shows(opacity):
        frame = pixels(page, "Original")[inner].astype(float)
        expected = frame * (1 - opacity) + opacity * DISPLAY_PALETTE[labels - 1][inner]
        return np.abs(pixels(page)[inner] - expected).max() <= 3

    expect(canvas(page)).to_have_attribute("data-frame", "4")
    for opacity in (0.5, 0.0, 0.8, 0):
        page.get_by_role("slider", name="Opacity").fill(str(opacity))
        wait_for(lambda opacity=opacity: shows(opacity))
    edge = ~inner
    edge[[0, -1]] = edge[:, [0, -1]] = False
    assert np.abs(pixels(page)[edge].astype(int) - DISPLAY_PALETTE[labels - 1][edge]).max() <= 3  # the outlines
    hidden = largest(labels, count=1)[0][0]
    button(page, f"Hide segment {hidden}").click()
    places = labels == hidden
    wait_for(lambda: np.abs(pixels(page).astype(int) - pixels(page, "Original"))[places].max() <= 3)


def test_everything_is_done_by_keyboard(open_page, server, clip):
    page = open_page(server)
    segment_clip(page, clip)
    count = rows(page).count()
    boxes = page.get_by_role("list", name="Segments").get_by_role("checkbox")
    boxes.nth(0).focus()
    page.keyboard.press("Space")
    expect(boxes.nth(0)).to_be_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(boxes.nth(1)).to_be_focused()
    page.keyboard.press("Space")
    page.keyboard.press("m")
    expect(rows(page)).to_have_count(count - 1)
    page.keyboard.press("Control+z")
    expect(rows(page)).to_have_count(count)
    page.keyboard.press("Control+Shift+Z")
    expect(rows(page)).to_have_count(count - 1)
    page.keyboard.press("Escape")
    boxes.nth(0).focus()
    page.keyboard.press("Space")
    page.keyboard.press("s")
    expect(rows(page)).to_have_count(count)
    page.keyboard.press("h")
    expect(page.get_by_role("button", name=re.compile(r"^Show segment"))).to_have_count(2)  # both parts
    slider = page.get_by_role("slider", name="Frame")
    slider.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("frame 2 of 6")).to_be_visible()
    page.get_by_role("tab", name="Segment").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Compare")).to_be_visible()


def test_a_slider_changes_the_number_of_segments(open_page, server, clip):
    page = open_page(server)
    segment_clip(page, clip)
    page.get_by_role("slider", name="Number of segments").fill("2")
    expect(rows(page)).to_have_count(2)
    rows(page).first.get_by_role("button").click()
    expect(button(page, "Undo")).to_be_enabled()
    page.get_by_role("slider", name="Number of segments").fill("3")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()  # corrections would be lost
    dialog.get_by_role("button").first.click()
    expect(rows(page)).to_have_count(2)


def test_reloading_keeps_the_clip_and_its_segments(open_page, server, clip):
    page = open_page(server)
    segment_clip(page, clip)
    count = rows(page).count()
    page.reload()
    expect(rows(page)).to_have_count(count)
    expect(page.get_by_text("disc.mp4: 6 frames")).to_be_visible()
    button(page, "Remove video").click()
    expect(canvas(page, "Original")).to_be_hidden()
    assert server.files() == []


def test_a_broken_file_gets_one_line(open_page, server, tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(make_clip(tmp_path / "whole.mp4").read_bytes()[:400])
    page = open_page(server)
    page.locator("#file").set_input_files(path)
    expect(page.get_by_role("alert")).to_have_text(
        "broken.mp4: cannot be decoded (Invalid data found when processing input); the file is damaged, truncated or "
        "no video, download or copy it again"
    )
    assert all("422" in problem for problem in page.problems)  # Chromium logs every answer that is an error
    page.problems.clear()


def test_a_second_user_sees_how_many_are_ahead(open_page, server, clip, monkeypatch):
    may_end = threading.Event()
    encode = Session._segmented

    def wait(session, task, *more):
        while not may_end.wait(0.01):
            task.check()
        return encode(session, task, *more)

    monkeypatch.setattr(Session, "_segmented", wait)
    first, second = open_page(server), open_page(server)
    for page in (first, second):
        page.get_by_label("Choose a video").set_input_files(clip)
        expect(canvas(page, "Original")).to_be_visible()
        button(page, "Segment").click()
        expect(button(page, "Cancel")).to_be_visible()
    expect(second.get_by_text("Waiting: 1 task ahead of yours").first).to_be_visible()
    button(first, "Cancel").click()
    expect(button(first, "Cancel")).to_be_hidden()
    expect(first.get_by_role("status")).to_have_text(re.compile("^Cancelled"))
    may_end.set()
    rows(second).first.wait_for()
    assert rows(first).count() == 0


def test_two_sources_are_compared_side_by_side(open_page, server, clip):
    page = open_page(server)
    page.get_by_role("tab", name="Compare").click()
    button(page, "Choose a video in Segment").click()
    page.locator("#file").set_input_files(clip)
    expect(canvas(page, "Original")).to_be_visible()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("combobox", name="Left", exact=True).select_option("run-0")
    page.get_by_role("combobox", name="Right", exact=True).select_option("run-0")
    button(page, "Compare").click()
    expect(page.get_by_text("Agreement (adjusted Rand index): 1.00")).to_be_visible()
    left = page.get_by_role("list", name="Segments on the left").get_by_role("listitem")
    right = page.get_by_role("list", name="Segments on the right").get_by_role("listitem")
    assert left.all_inner_texts() == right.all_inner_texts() != []
    page.get_by_role("combobox", name="Right", exact=True).select_option("cluster")
    button(page, "Compare").click()
    expect(page.get_by_text(re.compile(r"Agreement .*: (0|-0)\.\d\d$"))).to_be_visible()


def test_a_training_run_is_shown_while_it_grows(open_page, serve, image_run):
    run = image_run()
    page = open_page(serve(runs=[run]))
    page.get_by_role("tab", name="Training").click()
    expect(page.get_by_text(re.compile("step 3 of 3"))).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("[Cc]urves|loss"))).to_be_visible()
    (run / "samples").mkdir()
    Image.new("RGB", (40, 20), (200, 30, 30)).save(run / "samples/image-000007.png")
    with (run / "image/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "image", "step": 7, "loss": 0.125}) + "\n")
    expect(page.get_by_text(re.compile("step 7 of 3, loss 0.125"))).to_be_visible()
    expect(page.get_by_text("image, step 7 (newest)")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_of(open_page, server, clip, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(server, color_scheme=scheme)

    def check():
        violations = Axe().run(page).response["violations"]
        assert not violations, json.dumps(violations, indent=1)[:3000]

    check()
    segment_clip(page, clip)
    rows(page).nth(1).get_by_role("checkbox").check()
    check()
    page.get_by_role("tab", name="Compare").click()
    button(page, "Compare").click()
    page.get_by_role("list", name="Segments on the left").wait_for()
    check()
    page.get_by_role("tab", name="Training").click()
    page.get_by_role("heading", name="Curves").wait_for()
    check()


@pytest.mark.parametrize("width", [320, 768, 1440])
def test_the_page_fits_every_width(open_page, server, clip, width):
    page = open_page(server, viewport={"width": width, "height": 800})
    segment_clip(page, clip)
    for tab in ("Segment", "Compare", "Training"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_role("tab", name="Segment").click()
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter(e => e.checkVisibility())"
        ".map(e => [e.id, e.type, e.getBoundingClientRect()]).filter(([, type, r]) => type !== 'range' && "
        "type !== 'file' && (r.width < 24 || r.height < 24)).map(([id]) => id)"
    )
    assert small == []
