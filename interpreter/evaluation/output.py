"""The files of an evaluation, written and printed together."""

from pathlib import Path
from typing import Any

from interpreter.evaluation.gallery import Gallery
from interpreter.evaluation.record import Provenance, format_tables, write_scores, write_videos
from interpreter.evaluation.report import write_report
from interpreter.evaluation.scoring import Scores
from interpreter.files import remove_leftovers, write_text
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import waiting_for


def write_evaluation(
    home: Path, scores: Scores, provenance: Provenance, options: dict[str, Any], gallery: Gallery
) -> None:
    """Write tables, numbers, pictures and the report of an evaluation; print the tables and where the files are.

    Args:
        home: directory to write to.
        scores: the numbers.
        provenance: the origin of the numbers.
        options: options of the command, which are saved too.
        gallery: pictures of the best and worst videos.

    Raises:
        OSError: if the directory cannot be written.
        Interrupted: if a signal came while the files were written. They are complete when this is raised.
    """
    pictures, table = gallery.pictures(), format_tables(scores, provenance)
    # The files of one evaluation belong together, so other processes and signals wait until all are written.
    with waiting_for(home / ".lock", str(home)) as lock, StopRequest() as stop:
        if lock.exclusive:
            remove_leftovers(home)
        for picture in pictures:
            picture.save(home)
        write_text(home / "table.txt", table)
        write_scores(home / "scores.json", scores, provenance, options)
        write_videos(home / "videos.csv", scores, provenance)
        write_report(home / "report.html", scores, provenance, options, pictures)
    if stop.number:
        raise Interrupted(stop.number)
    print(table)
    for title, file in {"report": "report.html", "scores": "scores.json", "videos": "videos.csv"}.items():
        print(f"{title}: {home / file}")
    print(f"table: {home / 'table.txt'}\npictures: {home}")
