"""The pictures of docs/start.md and docs/tutorial.md: follows both pages in one folder, and keeps what they show.

    python -m profiling.tutorial_pictures FOLDER

FOLDER is new, and holds one file: the wheel with compiled ops that docs/start.md installs.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from profiling.common.paths import ROOT
from profiling.follow import run_script, script

PICTURES = {
    "start/preview.jpg": "masks/preview.png",
    "tutorial/curves.jpg": "runs/clips/curves.png",
    "tutorial/samples.jpg": "runs/clips/samples/image-001200.png",
    "tutorial/nine.jpg": "masks/nine/preview.png",
    "tutorial/seven.jpg": "masks/seven/preview.png",
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the wheel, where the commands run")
    folder = parser.parse_args().folder
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("start", "tutorial")]
    if len(list(folder.glob("*"))) != 1:
        sys.exit(f"error: {folder} has to hold one file, the wheel of dist/ with manylinux in its name")
    if status := run_script("".join(map(script, pages)), folder):
        sys.exit(f"error: a command of the pages ended with status {status}; it is the last one above")
    for name, source in PICTURES.items():
        picture = ROOT / "docs/pictures" / name
        picture.parent.mkdir(exist_ok=True)
        Image.open(folder / source).convert("RGB").save(picture, quality=88)
        print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
