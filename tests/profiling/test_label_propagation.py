"""The figures of docs/use/propagate_results.md: equal to the command's, and tables made of the results."""

import json

import numpy as np
import pytest
from PIL import Image

from interpreter import propagate
from interpreter.render import write_palette_png
from profiling import label_propagation
from profiling.label_propagation import BLOCK, PAGE, blocks, main, write_page

REMEDY = "run `python -m profiling.label_propagation page`, look at the difference and commit it"


@pytest.fixture
def davis(tmp_path):
    """DAVIS-2016 with one sequence, a disc that moves, of which 4 frames are scored."""
    rows, columns = np.mgrid[:48, :80]
    for t in range(6):
        disc = (rows - 24) ** 2 + (columns - 20 - 5 * t) ** 2 < 150
        frame = np.where(disc[..., None], (230, 60, 30), (40 + rows, 90 + 0 * rows, 40 + columns)[0][..., None])
        for folder in ("JPEGImages", "Annotations"):
            (tmp_path / "davis" / folder / "480p/disc").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame.astype(np.uint8)).save(tmp_path / f"davis/JPEGImages/480p/disc/{t:05d}.png")
        write_palette_png(disc.astype(np.uint8), tmp_path / f"davis/Annotations/480p/disc/{t:05d}.png")
    (tmp_path / "davis/ImageSets/2016").mkdir(parents=True)
    (tmp_path / "davis/ImageSets/2016/val.txt").write_text("disc\n")
    return tmp_path / "davis"


def test_figures_are_those_of_the_command(davis, tmp_path, monkeypatch, capsys):
    backbone = davis.parent / "vit"
    _save_vit(backbone)
    monkeypatch.setattr(label_propagation, "RESULTS", tmp_path / "results")
    options = ["--backbone", str(backbone), "--frame-size", "96", "160", "--top-k", "3", "--root", str(davis)]
    for layer in ("0", "-1"):
        pictures = ["--pictures", str(tmp_path / "pictures")]
        main(["davis", *options, "--feature-layer", layer, "--years", "2016", *pictures])
    files = sorted((tmp_path / "results").iterdir())
    names = ("block-0", "last-block")
    assert [path.name for path in files] == [f"label-propagation-{name}-cpu.json" for name in names]
    assert not any(str(tmp_path) in path.read_text() for path in files)
    rows = {row["masks"]: row["mean"]["jf"] for path in files for row in json.loads(path.read_text())["rows"]}
    for title, layer in (("block 0", "0"), ("last block", "-1")):
        for edges, suffix in (("none", ""), ("guided", ", guided edges")):
            out = tmp_path / f"{layer}-{edges}"
            more = ["--feature-layer", layer, "--edges", edges, "--data", "davis", "--year", "2016"]
            propagate.main([*options, *more, "--out", str(out)])
            main_row, copied, *_ = json.loads((out / "evaluation/scores.json").read_text())["results"]
            assert rows[title + suffix] == pytest.approx(main_row["mean"]["jf"], abs=1e-12)
    assert rows["copies of the first mask"] == pytest.approx(copied["mean"]["jf"], abs=1e-12)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["best-1-disc.png"]
    assert f"| DAVIS-2016 | block 0 | none | {rows['block 0']:.3f} |" in capsys.readouterr().out
    lines = label_propagation.blocks(tmp_path / "results")["scores"]
    assert sum("copies of the first mask" in line for line in lines) == 1  # it is in both files
    assert f"| DAVIS-2016 | last block | guided | {rows['last block, guided edges']:.3f} |" in "\n".join(lines)


def _save_vit(folder):
    """A ViT of two small blocks in Hugging Face's format, with random weights."""
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)


def test_page_shows_the_results():
    text = (label_propagation.ROOT / PAGE).read_text()
    assert sorted(name for _, name, _ in BLOCK.findall(text)) == sorted(blocks())
    assert not write_page(check=True), REMEDY
