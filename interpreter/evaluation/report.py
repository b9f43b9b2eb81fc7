"""Writes the report: one HTML file that loads nothing from the network."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from PIL import Image

from interpreter.evaluation.candidates import EDGES, Entry
from interpreter.evaluation.gallery import Picture
from interpreter.evaluation.record import TITLES, Provenance, cell, empty_segments, scored
from interpreter.evaluation.scoring import Row, Scores
from interpreter.evaluation.style import CSS
from interpreter.files import write_text
from interpreter.metrics import METRICS, Protocol
from interpreter.render.plots import plot_points, plot_sorted, plot_sweep
from interpreter.segmentation import Edges

COMPARED = 3  # baselines in a plot, in addition to the main entry
SHOWN_METRICS = 3  # metrics of a protocol in the table of videos
JPEG_QUALITY = 88


def write_report(
    path: Path,
    scores: Scores,
    provenance: Provenance,
    config: Mapping[str, object],
    pictures: Sequence[Picture],
) -> None:
    """Write the report of an evaluation, with tables, plots, pictures and definitions in one file."""
    rows = scores.rows()
    body = [
        f"<h1>{_text(provenance.subject)} on {_text(provenance.data)}</h1>",
        f'<p class="soft">{len(scores.videos)} videos of split {_text(provenance.split)}, commit '
        f"{_text(provenance.commit)}, {date.today().isoformat()}</p>",
        _skipped(scores),
        *(_protocol(p, [row for row in rows if row.protocol == p], scores, provenance) for p in scores.protocols),
        _pictures(pictures, scores.protocols[0], provenance),
        _videos(scores, provenance),
        _definitions(scores.protocols, config),
    ]
    title = _text(f"{provenance.subject} on {provenance.data}")
    # With this policy, a browser loads nothing from other places.
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'\"><title>{title}</title><style>{CSS}</style></head>"
    )
    write_text(path, f"{head}<body><main>{''.join(body)}</main></body></html>\n")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _stamp(provenance: Provenance, protocol: str, rest: str = "") -> str:
    parts = {"protocol": protocol, "split": provenance.split, "commit": provenance.commit}
    named = " · ".join(f"{name} <b>{_text(value)}</b>" for name, value in parts.items())
    return f'<p class="stamp">{named}{" · " + _text(rest) if rest else ""}</p>'


def _image(data: bytes, kind: str, alternative: str) -> str:
    code = base64.b64encode(data).decode("ascii")
    return f'<img alt="{_text(alternative)}" src="data:image/{kind};base64,{code}">'


def _figure(caption: str, data: bytes, kind: str = "png") -> str:
    return f"<figure><figcaption>{_text(caption)}</figcaption>{_image(data, kind, caption)}</figure>"


def _table(head: Sequence[str], lines: Iterable[str]) -> str:
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _skipped(scores: Scores) -> str:
    if not scores.skipped:
        return ""
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(reason)}</dd>" for name, reason in scores.skipped)
    return f'<section class="warning"><h2>Not scored: {len(scores.skipped)}</h2><dl>{items}</dl></section>'


def _protocol(protocol: Protocol, rows: Sequence[Row], scores: Scores, provenance: Provenance) -> str:
    """Table and plots of a protocol."""
    table = [row for row in rows if row.entry.kind != "sweep"]
    best = {name: _best(name, table) for name in protocol.metrics}

    def line(row: Row) -> str:
        cells = "".join(
            f"<td{' class=best' if row.mean[name] == best[name] else ''}>{_text(cell(row, name))}</td>"
            for name in protocol.metrics
        )
        mark = " class=main" if row.entry.kind == "main" else ""
        return f"<tr{mark}><td>{_text(row.entry.name)}</td>{cells}</tr>"

    seeds = max(len(row.seeds) for row in rows)
    rest = scored(rows[0]) + (f" · mean ± sample standard deviation over {seeds} seeds" if seeds > 1 else "")
    plots = [*_sweeps(protocol, rows), *_distributions(protocol, table, scores)]
    notes = filter(None, (empty_segments(scores, rows), scores.objectless(protocol)))
    return (
        f"<section><h2>{_text(protocol.label)}</h2><p>{_text(protocol.summary)}</p>"
        + _stamp(provenance, protocol.label, rest)
        + _table(["", *(TITLES[name] for name in protocol.metrics)], map(line, table))
        + "".join(f'<p class="soft">{_text(note)}</p>' for note in notes)
        + f'<div class="plots">{"".join(plots)}</div></section>'
    )


def _best(name: str, rows: Sequence[Row]) -> float:
    values = [row.mean[name] for row in rows if not math.isnan(row.mean[name])]
    return (min if "lower is better" in METRICS[name] else max)(values, default=math.nan)


def _sweeps(protocol: Protocol, rows: Sequence[Row]) -> list[str]:
    """Plots of the first two metrics against each setting that was tried. Dashed: the run with its own setting."""
    swept: dict[tuple[str, Edges], list[Row]] = {}
    for row in rows:
        if row.entry.sweep:
            swept.setdefault((row.entry.sweep[0], row.entry.edges), []).append(row)
    main, figures = {row.entry.edges: row for row in rows if row.entry.kind == "main"}, []
    for (setting, edges), tried in swept.items():
        for name in protocol.metrics[:2]:
            points = [(r.entry.sweep[1], r.mean[name], r.std[name] if r.std else 0.0) for r in tried if r.entry.sweep]
            references = {"as evaluated above": main[edges].mean[name]}
            plot = plot_sweep(points, x=setting, y=TITLES[name], references=references)
            title = f"{TITLES[name]} against the {setting} at inference{EDGES[edges]}, {protocol.name}"
            figures.append(_figure(title, plot))
    return figures


def _distributions(protocol: Protocol, rows: Sequence[Row], scores: Scores) -> list[str]:
    """Plots of the headline metric of each video, and of identity switches against the length of videos."""
    entries = _compared(rows)
    headline = protocol.metrics[0]
    values = {entry.name: list(scores.per_video(protocol, entry, headline).values()) for entry in entries}
    figures = [_figure(f"{TITLES[headline]} of each video, {protocol.name}", plot_sorted(values, y=TITLES[headline]))]
    if "identity_switches" in protocol.metrics:
        points = {}
        for entry in entries:
            switches = scores.per_video(protocol, entry, "identity_switches")
            points[entry.name] = [(scores.videos[video], count) for video, count in switches.items()]
        plot = plot_points(points, x="frames", y="identity switches per object")
        figures.append(_figure(f"Identity switches against the length of the video, {protocol.name}", plot))
    return figures


def _compared(rows: Sequence[Row]) -> list[Entry]:
    """The main entry, and the strongest baselines with the same edges by the headline metric."""
    main, headline = rows[0].entry, rows[0].protocol.metrics[0]
    baselines = [row for row in rows if row.entry.kind == "baseline" and row.entry.edges == main.edges]
    baselines = [row for row in baselines if not math.isnan(row.mean[headline])]
    baselines.sort(key=lambda row: -row.mean[headline])
    return [main, *(row.entry for row in baselines[:COMPARED])]


def _pictures(pictures: Sequence[Picture], protocol: Protocol, provenance: Provenance) -> str:
    if not pictures:
        return ""
    figures = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.image).save(file, "JPEG", quality=JPEG_QUALITY)
        caption = f"{picture.rank}: {picture.video}, {TITLES[protocol.metrics[0]]} {picture.score:.3f}"
        figures.append(_figure(caption, file.getvalue(), "jpeg"))
    stamp = _stamp(provenance, protocol.label, f"by {TITLES[protocol.metrics[0]]} under the first seed")
    return f'<section class="pictures"><h2>Best and worst videos</h2>{stamp}{"".join(figures)}</section>'


def _videos(scores: Scores, provenance: Provenance) -> str:
    """A line for each video, worst first: first metrics of the main entry, headline metric of the best baseline."""
    head, columns = ["video", "frames"], []
    for protocol in scores.protocols:
        rows = [row for row in scores.rows() if row.protocol == protocol and row.entry.kind != "sweep"]
        main, *others = _compared(rows)
        shown = [(main, name) for name in protocol.metrics[:SHOWN_METRICS]]
        shown += [(other, protocol.metrics[0]) for other in others[:1]]
        for entry, name in shown:
            suffix = "" if entry is main else f", {entry.name}"
            head.append(f"{TITLES[name]} ({protocol.name}{suffix})")
            columns.append(scores.per_video(protocol, entry, name))
    order = sorted(scores.videos, key=lambda v: (math.isnan(columns[0][v]), columns[0][v]))
    lines = []
    for video in order:
        numbers = (("–" if math.isnan(c[video]) else f"{c[video]:.3f}") for c in columns)
        cells = "".join(f"<td>{text}</td>" for text in numbers)
        lines.append(f"<tr><td>{_text(video)}</td><td>{scores.videos[video]}</td>{cells}</tr>")
    protocols = ", ".join(protocol.label for protocol in scores.protocols)
    stamp = _stamp(provenance, protocols, "mean over objects and seeds, worst first")
    return f"<section><h2>Videos</h2>{stamp}{_table(head, lines)}</section>"


def _definitions(protocols: Sequence[Protocol], config: Mapping[str, object]) -> str:
    parts = []
    for protocol in protocols:
        parts.append(f"<h3>{_text(protocol.label)}</h3><p>{_text(protocol.summary)}</p><dl>")
        entries = {TITLES[name]: METRICS[name] for name in protocol.metrics}
        entries |= {"Comparable with": protocol.comparable, "Not comparable with": protocol.not_comparable}
        parts += [f"<dt>{_text(name)}</dt><dd>{_text(meaning)}</dd>" for name, meaning in entries.items()]
        parts.append("</dl>")
    settings = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in config.items())
    return f"<section><h2>What the numbers are</h2>{''.join(parts)}<h3>Settings</h3><dl>{settings}</dl></section>"
