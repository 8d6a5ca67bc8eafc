"""The parts of a self-contained HTML page: headings, notes, tables, embedded pictures."""

import base64
import html
import pathlib
from collections.abc import Iterable, Sequence

_STYLE = """<style>
body {font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222}
table {border-collapse: collapse} td, th {padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top}
th {font-weight: 600} tr + tr {border-top: 1px solid #ddd} .note {color: #805000} img {max-width: 100%}
</style>"""


def page(title: str, parts: Iterable[str]) -> str:
    """Returns the text of an HTML file; the functions below make its parts."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>{_STYLE}'
    return f'{head}{"".join(parts)}</html>\n'


def heading(text: str, level: int = 2) -> str:
    """Returns a heading; level 1 is for the page's title."""
    return f'<h{level}>{html.escape(text)}</h{level}>'


def note(text: str) -> str:
    """Returns a paragraph that stands out."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of text; the first column holds the rows' names."""

    def cells(row: Sequence[str]) -> str:
        first, *rest = (html.escape(cell) for cell in row)
        return f'<th>{first}</th>' + ''.join(f'<td>{cell}</td>' for cell in rest)

    return '<table>' + ''.join(f'<tr>{cells(row)}</tr>' for row in rows) + '</table>'


def picture(title: str, path: pathlib.Path) -> str:
    """Returns a heading and a PNG file as an embedded picture."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'{heading(title)}<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
