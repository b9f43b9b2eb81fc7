"""Make the pictures of docs/use/app.md: the page with a segmented clip, at three widths, and its tab Training.

    python -m profiling.app_pictures --run demo/clip --clip CLIP

It starts the server and a headless Chromium, and fails if the browser's console shows an error.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from interpreter.data import open_video
from interpreter.render.video import VideoWriter

OUT = Path(__file__).parents[1] / "docs/pictures/app"
WIDTHS = {"wide": 1280, "medium": 768, "narrow": 360}


def as_file(clip: Path, folder: Path) -> Path:
    """The clip as a video file, because the page only accepts files."""
    if clip.is_file():
        return clip
    video = open_video(clip)
    with VideoWriter(folder / f"{clip.name}.mp4", video.fps, (video.height, video.width)) as writer:
        for frame in video.frames():
            writer.write(frame)
    return folder / f"{clip.name}.mp4"


def take(page: Page, name: str) -> None:
    """Save the whole page as docs/pictures/app/NAME.jpg."""
    path = OUT / f"{name}.jpg"
    page.screenshot(path=path, full_page=True, type="jpeg", quality=88)
    print(path)


def segment(page: Page, clip: Path, address: str) -> None:
    """Walk through the page until two segments are merged and one is named."""
    page.goto(address)
    page.get_by_label("Choose a video").set_input_files(clip)
    page.get_by_role("button", name="Segment", exact=True).click()
    boxes = page.get_by_role("list", name="Segments").get_by_role("checkbox")
    boxes.first.wait_for(timeout=300_000)
    boxes.nth(2).check()
    page.get_by_label("Name", exact=True).fill("first object")
    page.get_by_role("button", name="Save name").click()
    expect(page.get_by_role("button", name="Undo")).to_be_enabled()
    slider = page.get_by_role("slider", name="Frame")
    slider.fill(str(int(slider.get_attribute("max") or 0) // 2))
    page.wait_for_timeout(1500)  # for the pictures of that frame


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True, help="video file or folder of frames")
    options = parser.parse_args()
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    OUT.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "interpreter.app", "--port", "0", "--run", str(options.run)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        address = server.stdout.readline().split()[1]
        clip = as_file(options.clip, Path(folder))
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        problems: list[str] = []
        for name, width in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.on("console", lambda message: problems.append(message.text))
            segment(page, clip, address)
            take(page, name)
            if name == "wide":
                page.get_by_role("tab", name="Training").click()
                page.get_by_role("heading", name="Masks during training").wait_for()
                page.wait_for_timeout(1500)
                take(page, "training")
            page.close()
        browser.close()
        server.terminate()
    if problems:
        sys.exit("the console of the browser shows: " + "; ".join(problems))


if __name__ == "__main__":
    main()
