"""Markdown that all pages share: wrapped paragraphs, tables, and texts of times, ratios and links."""

import re
import textwrap
from collections.abc import Iterable, Sequence

DATA = "profiling/results"


def paragraph(text: str, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most 118 columns, with no break in short pieces of code; ``first`` and ``rest`` begin the lines."""
    glued = re.sub(r"`[^`]{,90}`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(glued, 118, initial_indent=first, subsequent_indent=rest, break_long_words=False,
                          break_on_hyphens=False)  # fmt: skip
    return [line.replace("\0", " ") for line in lines]


def bullet(text: str) -> list[str]:
    """An entry of a list."""
    return paragraph(text, "- ", "  ")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table."""
    return [_line(heads), "|" + "---|" * len(heads), *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def data(file: str, up: int = 2) -> str:
    """A link to a file of results, from a page that is ``up`` folders below the root."""
    return f"[{file}]({'../' * up}{DATA}/{file})"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def times(value: float) -> str:
    """A ratio; in bold if below 1."""
    text = f"{value:.3g}×" if value < 100 else f"{value:.0f}×"
    return text if value >= 1 else f"**{text}**"


def ms(value: float) -> str:
    """Milliseconds with three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
