"""The model card of a run: the README.md of its repository on the Hugging Face hub."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from interpreter.configs import WITHOUT_SPLITS, BackboneConfig, DataConfig
from interpreter.evaluation.record import TITLES
from interpreter.files import read_text
from interpreter.hub.contents import BUNDLED, backbones
from interpreter.hub.names import PREFIX, HubName
from interpreter.hub.packing import Packed
from interpreter.models.backbones.load import split_revision

LICENSES = {
    BUNDLED: "Apache-2.0",
    "facebook/dinov2-": "Apache-2.0",
    "facebook/dino-": "Apache-2.0",
    "facebook/dinov3-": "the DINOv3 License of Meta",
}
"""Licences of known backbones, by the beginning of their names."""
SHOWN = 4  # metrics of a protocol
TAGS = ["object-centric-learning", "video-segmentation", "unsupervised", "interpreter-slots"]


def write_card(packed: Packed, name: HubName, license: str) -> None:
    """Write ``README.md`` into the packed folder.

    Args:
        packed: the run.
        name: name of its repository.
        license: licence of the weights as an identifier of the hub, such as "apache-2.0".
    """
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        license=license,
        library_name="interpreter-slots",
        pipeline_tag="image-segmentation",
        tags=[*TAGS, packed.method.name],
        base_model=[split_revision(b.backbone)[0] for b in _used(packed) if _is_hub_id(b.backbone)] or None,
    )
    use, training, scores = _how_to_use(name), _training(packed), _scores(packed)
    sections = (_title(packed, name), use, training, scores, _licenses(packed, license))
    text = "\n\n".join("\n".join(lines).strip() for lines in sections)
    (packed.folder / "README.md").write_text(f"---\n{about.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _is_hub_id(backbone: str) -> bool:
    return backbone != BUNDLED and not backbone.startswith("run:")


def _used(packed: Packed) -> list[BackboneConfig]:
    """The backbones of the stages, without duplicates."""
    every = [backbone for options in packed.options.values() for backbone in backbones(options)]
    return list(dict.fromkeys(every))


def _title(packed: Packed, name: HubName) -> Iterator[str]:
    method = packed.method
    yield f"# {name.repository.partition('/')[2]}"
    yield ""
    yield f"Splits videos into objects without labels. Method: **{method.name}**, {method.summary}."
    yield ""
    yield f"Citation of the method: {method.citation}"


def _how_to_use(name: HubName) -> Iterator[str]:
    address = f"hub:{name.repository}" + ("" if name.revision == "main" else f"@{name.revision}")
    yield "## Use"
    yield ""
    yield "With the package `interpreter-slots` and `huggingface_hub`:"
    yield ""
    yield f"```\npython -m interpreter.segment clip.mp4 --run {address} --out out\n```"
    yield ""
    yield "```python"
    yield "import interpreter\n"
    yield f'result = interpreter.segment_video("clip.mp4", run="{address}")'
    yield "maps = list(result.labels())  # the segment of each pixel, uint8 [H, W] per frame"
    yield "```"
    yield ""
    yield "The repository contains no code and no pickles: weights are safetensors."


def _training(packed: Packed) -> Iterator[str]:
    yield "## Training"
    yield ""
    yield "| stage | steps | batch size | learning rate | seed |"
    yield "|---|---|---|---|---|"
    for key, options in packed.options.items():
        optim, step = options.optim, packed.steps[key]
        steps = str(step) if step >= optim.steps else f"{step} of {optim.steps} (unfinished)"
        yield f"| {key} | {steps} | {optim.batch_size} | {optim.peak_lr:g} | {optim.seed} |"
    yield ""
    for key, options in packed.options.items():
        if isinstance(data := getattr(options, "data", None), DataConfig):
            yield f"- Data of the {key} stage: {_data(data)}"
    for key, start in packed.starts.items():
        yield f"- The {key} stage started from the weights of {start}"
    for backbone in _used(packed):
        inside = " (its weights are in this repository)" if backbone.backbone.startswith("run:") else ""
        yield f"- Backbone: {_called(backbone.backbone)}{inside}, output {backbone.output}"
    yield f"- Packed with interpreter-slots at {packed.commit}; `config.json` holds all options"


def _called(backbone: str) -> str:
    """The name of a backbone for readers. A backbone that belongs to a run has no name."""
    return "a vision transformer of the author" if backbone.startswith("run:") else f"`{backbone.removeprefix(PREFIX)}`"


def _data(data: DataConfig) -> str:
    """A description of a data set, without its path."""
    height, width = data.frame_size
    parts = [data.data + (f" {data.year}" if data.data == "davis" else "")]
    if data.data == "synthetic":
        parts[0] = f"generated scenes ({data.num_videos} videos of {data.scene_frames} frames)"
    elif data.data == "folder":
        parts[0] = "a folder of videos"
    if data.data not in WITHOUT_SPLITS:
        parts.append(f"split {data.split}")
    parts.append(f"frames of {height}x{width} (height x width)")
    if data.crop != "none":
        parts.append(f"{data.crop} squares")
    return ", ".join(parts)


def _scores(packed: Packed) -> Iterator[str]:
    yield "## Scores"
    yield ""
    found, others = _read_scores(packed)
    if not found:
        yield "There are no scores of these weights: they were not evaluated before they were uploaded."
    for report in found:
        for row in (row for row in report["results"] if row["kind"] == "main"):
            protocol = report["protocols"][row["protocol"]]
            metrics = [name for name in protocol["metrics"] if row["mean"].get(name) is not None][:SHOWN]
            yield (
                f"{report['data']}, split {report['split']}, protocol {row['protocol']} version {row['version']}, "
                f"{len(report['frames'])} videos, {row['method']}, edges {row['edges']}, code {report['commit']}:"
            )
            yield ""
            yield "| " + " | ".join(TITLES[name] for name in metrics) + " |"
            yield "|" + "---|" * len(metrics)
            yield "| " + " | ".join(_cell(row, name) for name in metrics) + " |"
            yield ""
    if others:
        packed.notes.append(
            f"left out: scores in {packed.run / 'evaluation'} that are of other weights, or from an earlier version "
            f"({others}); evaluate again to have scores on the card"
        )


def _cell(row: dict[str, Any], name: str) -> str:
    std = row["std"] or {}
    spread = f" ± {std[name]:.3f}" if std.get(name) is not None else ""
    return f"{row['mean'][name]:.3f}{spread}"


def _read_scores(packed: Packed) -> tuple[list[dict[str, Any]], int]:
    """The evaluations of the packed weights in the run's directory, and the number of all other evaluations."""
    found, others = [], 0
    for path in sorted((packed.run / "evaluation").glob("*/scores.json")):
        report: Any = None
        with suppress(ValueError, RecursionError):  # damaged: counted as one of other weights
            report = json.loads(read_text(path))
        weights = report.get("weights") if isinstance(report, dict) else None
        if isinstance(weights, dict) and weights and all(packed.weights.get(k) == v for k, v in weights.items()):
            found.append(report)
        else:
            others += 1
    return found, others


def _licenses(packed: Packed, license: str) -> Iterator[str]:
    yield "## Licences"
    yield ""
    yield f"- Weights of the stages: {license}"
    for backbone in _used(packed):
        name = backbone.backbone.removeprefix(PREFIX)
        known = next((text for start, text in LICENSES.items() if name.startswith(start)), None)
        page = "; see its page" if _is_hub_id(name) else ""
        yield f"- Backbone {_called(name)}: {known or f'not known to the program that wrote this card{page}'}"
    yield "- Code (interpreter-slots): Apache-2.0"
