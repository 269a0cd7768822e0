"""One HTML file with its styles, its program and its data inside: opens from disk, needs no network.

A page is a list of sections: text, tables, bars, images (here) and curves (`page_curves`). All that comes
from outside is escaped, and the page's own policy lets the browser run no program but ours and load nothing.
"""

import base64
import hashlib
import html
import mimetypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hardy.cli.page_curves import Curves, curves_html
from hardy.config import UserError

STYLES = ("page.css",)
SCRIPTS = ("data.js", "chart.js", "controls.js")
NUM_COLOURS = 6
"""Colours in page.css that people who see few colours can tell apart; further curves are dashed."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A cell that says whether something is as it should be."""

    text: str
    holds: bool


Cell = str | Verdict


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs."""

    title: str
    paragraphs: Sequence[str]
    is_warning: bool = False
    """Whether the reader must not miss it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1
    """Leading columns that are text and stand at the left; the others are numbers."""
    note: str = ""
    """What a reader must know to read it."""
    is_folded: bool = False
    """Whether it opens at a click on its title."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar."""

    label: str
    value: float
    text: str
    """The value in words, with its unit."""
    colour: int = 0
    """Number of its colour; the same as that of a group of curves, counted from 0."""
    spread: float | None = None
    """Half the width of an interval around the value."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars of one quantity, from zero."""

    title: str
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture, which the page carries with it."""

    title: str
    file: Path
    """PNG, JPEG, GIF, WebP or SVG."""
    description: str
    """What it shows, for those who cannot see it."""


Section = Text | Table | Bars | Image | Curves


def write_page(path: Path, *, title: str, sections: Sequence[Section], lead: str = "") -> Path:
    """Write a page and return `path`.

    Args:
        path: the file; its folder must exist.
        title: heading of the page.
        sections: what stands on it, from top to bottom.
        lead: a sentence or two below the heading.

    Raises:
        UserError: the page cannot be written, or a picture cannot be read.

    Example:
        >>> import tempfile
        >>> table = Table(title="Runs", heading=["run", "loss"], rows=[["<a>", "1.5"]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = write_page(Path(folder) / "a.html", title="Two runs", sections=[table]).read_text()
        >>> "&lt;a&gt;" in text and "<a>" not in text
        True
    """
    page = page_html(title=title, sections=sections, lead=lead)
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"the page {path} could not be written: {error.strerror}") from None
    return path


def page_html(*, title: str, sections: Sequence[Section], lead: str = "") -> str:
    """Return the text of a page; see `write_page`."""
    script = "\n".join(map(_file, SCRIPTS))
    parts = {
        "title": html.escape(title),
        "lead": f'<p class="lead">{html.escape(lead)}</p>' if lead else "",
        "styles": "\n".join(map(_file, STYLES)),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "sections": "\n".join(_section_html(section, number) for number, section in enumerate(sections)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def _file(name: str) -> str:
    return (resources.files("hardy.cli") / "page_files" / name).read_text(encoding="utf-8").strip()


def _section_html(section: Section, number: int) -> str:
    heading = f"<h2>{html.escape(section.title)}</h2>" if section.title else ""
    kind = type(section).__name__.lower()
    if isinstance(section, Text):
        kind += " warning" if section.is_warning else ""
        body = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs)
    elif isinstance(section, Table):
        body = _table_html(section)
    elif isinstance(section, Bars):
        body = _bars_html(section)
    elif isinstance(section, Image):
        body = _image_html(section)
    else:
        body = curves_html(section, name=f"curves-{number}")
    if isinstance(section, Table) and section.is_folded:
        return f'<section class="{kind}"><details><summary>{heading}</summary>{body}</details></section>'
    return f'<section class="{kind}">{heading}{body}</section>'


def _note_html(note: str) -> str:
    return f'<p class="note">{html.escape(note)}</p>' if note else ""


def _table_html(table: Table) -> str:
    """Return a table that scrolls sideways by itself where the screen is narrow; by keyboard too."""

    def kind(column: int) -> str:
        return ' class="word"' if column < table.words else ""

    head = "".join(
        f'<th scope="col"{kind(column)}>{html.escape(cell)}</th>' for column, cell in enumerate(table.heading)
    )
    rows = []
    for row in table.rows:
        first = f'<th scope="row" class="word">{_cell_html(row[0])}</th>' if table.words else ""
        rest = list(enumerate(row))[1 if table.words else 0 :]
        cells = "".join(f"<td{kind(column)}>{_cell_html(cell)}</td>" for column, cell in rest)
        rows.append(f"<tr>{first}{cells}</tr>")
    label = html.escape(table.title or "table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>{_note_html(table.note)}"
    )


def _cell_html(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    kind, sign = ("holds", "✓") if cell.holds else ("misses", "✗")
    return f'<span class="{kind}">{sign} {html.escape(cell.text)}</span>'


def _bars_html(bars: Bars) -> str:
    longest = max((bar.value + (bar.spread or 0) for bar in bars.bars), default=0) or 1
    rows = []
    for bar in bars.bars:
        width = max(0.0, bar.value / longest * 100)
        whisker = ""
        if bar.spread:
            left = max(0.0, (bar.value - bar.spread) / longest * 100)
            right = (bar.value + bar.spread) / longest * 100
            whisker = f'<i class="whisker" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
        rows.append(
            f'<li><span class="name">{html.escape(bar.label)}</span><span class="track">'
            f'<i class="bar c{bar.colour % NUM_COLOURS}" style="width:{width:.2f}%"></i>{whisker}</span>'
            f'<span class="value">{html.escape(bar.text)}</span></li>'
        )
    return f'<ul class="bar-list">{"".join(rows)}</ul>{_note_html(bars.note)}'


def _image_html(image: Image) -> str:
    kind = mimetypes.guess_type(image.file.name)[0] or ""
    if not kind.startswith("image/"):
        raise UserError(f"{image.file} is no picture by its name; give a PNG, JPEG, GIF, WebP or SVG file")
    try:
        data = base64.b64encode(image.file.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"the picture {image.file} cannot be read: {error.strerror}") from None
    return f'<img src="data:{kind};base64,{data}" alt="{html.escape(image.description)}">'
