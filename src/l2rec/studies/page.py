"""The page of a study, as data and as files: ``report.md`` and one self-contained ``report.html``.

The study fills a `Page`, all of it text; `write` writes both files from it.
"""

from __future__ import annotations

__all__ = [
    "BEST",
    "PLAIN",
    "SECOND",
    "Cell",
    "Group",
    "Made",
    "Page",
    "Section",
    "Table",
    "chart_of",
    "markdown",
    "write",
]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from l2rec.disk import write_text
from l2rec.runs.chart import Chart, Frame, Line, Mark, Tick, padded, rendered, y_axis
from l2rec.studies.tables import markdown_row

BEST, SECOND, PLAIN = "best", "second", ""
STYLES = ("main", "second", "third", "fourth", "fifth", "sixth")
"""Styles of a figure's lines, in the order of its series."""


@dataclass(frozen=True)
class Cell:
    """One number as text, and whether it is the best or second best of its column."""

    text: str
    mark: str = PLAIN


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other, under a caption."""

    caption: str
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Table:
    """A table of groups of rows."""

    header: list[str]
    groups: list[Group]


@dataclass(frozen=True)
class Section:
    """The results on one data set: a table, a chart if there is a figure, and notes below."""

    title: str
    facts: str
    table: Table
    chart: Chart | None
    notes: list[str]


@dataclass(frozen=True)
class Made:
    """How one cell was made."""

    name: str
    command: str
    facts: str


@dataclass(frozen=True)
class Page:
    """All that the page says, as text."""

    title: str
    reproduces: str
    about: str
    made: str
    sections: list[Section]
    comparisons: Table | None
    compared_how: str
    published: Section | None
    cells: list[Made]
    unfinished: list[tuple[str, str]]
    kind: str = "experiment"
    """What it is a page of, for its head."""


def chart_of(
    series: Mapping[str, Mapping[float, float]],
    *,
    title: str,
    summary: str,
    note: str,
    x_label: str,
    log: bool = False,
    names: Mapping[float, str] | None = None,
) -> Chart:
    """Draw lines, each of values by x.

    Args:
        series: at least one line, each with at least one point.
        log: whether the axis of x is logarithmic.
        names: labels of some x, by default the numbers.
    """
    at: Callable[[float], float] = math.log10 if log else float
    xs = sorted({x for points in series.values() for x in points})
    low, high = at(xs[0]), at(xs[-1])
    room = 0.03 * (high - low) or 0.5
    values = [y for points in series.values() for y in points.values()]
    frame = Frame((low - room, high + room), padded(values))
    styles = [STYLES[n % len(STYLES)] for n in range(len(series))]
    drawn, marks = [], []
    for style, (name, points) in zip(styles, series.items(), strict=True):
        along = [(at(x), y) for x, y in sorted(points.items())]
        drawn.append(Line(frame.path(along), style, name))
        marks += [Mark(frame.x(x), frame.y(y), 0, "middle", "", f"dot {style}") for x, y in along]
    return Chart(
        title=title,
        summary=summary,
        note=note + " The axis is logarithmic." * log,
        x_label=x_label,
        frame=frame,
        x_ticks=[Tick(frame.x(at(x)), (names or {}).get(x, f"{x:g}")) for x in xs],
        y_ticks=y_axis(frame),
        lines=drawn,
        marks=marks,
    )


def write(contents: Page, out: Path) -> list[Path]:
    """Write a page as ``report.md`` and ``report.html`` into a folder; return both paths.

    Raises:
        CheckpointError: a file that cannot be written.
    """
    paths = [out / "report.md", out / "report.html"]
    write_text(paths[0], markdown(contents))
    write_text(paths[1], rendered("studies/page.html.j2", contents))
    return paths


# -- Markdown ------------------------------------------------------------------------------------


def markdown(contents: Page) -> str:
    """Write a page as Markdown."""
    lines = [f"# {contents.title}", ""]
    lines += [f"Reproduces {contents.reproduces}.", ""] if contents.reproduces else []
    lines += [contents.about, ""] if contents.about else []
    lines += [f"Rendered {contents.made}.", ""]
    for section in contents.sections:
        lines += _section_lines(section)
    if contents.comparisons is not None:
        lines += ["## Comparisons", "", *_table_lines(contents.comparisons)]
        lines += [contents.compared_how, ""]
    if contents.published is not None:
        lines += _section_lines(contents.published)
    if contents.cells:
        lines += ["## How every number was made", ""]
        lines += [f"- **{c.name}**: `{c.command}`: {c.facts}." for c in contents.cells]
        lines.append("")
    if contents.unfinished:
        lines += ["## Not finished", ""]
        lines += [f"- {name}: {why}" for name, why in contents.unfinished]
    return "\n".join(lines).rstrip() + "\n"


def _section_lines(section: Section) -> list[str]:
    lines = [f"## {section.title}", ""]
    lines += [f"{section.facts}.", ""] if section.facts else []
    if section.chart is not None:
        lines += [f"{section.chart.summary} The figure is in report.html.", ""]
    return [*lines, *_table_lines(section.table), *(f"- {note}" for note in section.notes), ""]


def _table_lines(table: Table) -> list[str]:
    marks = {BEST: "**{}**", SECOND: "<u>{}</u>", PLAIN: "{}"}
    lines = [markdown_row(table.header), "|---|" + "---:|" * (len(table.header) - 1)]
    for group in table.groups:
        if len(table.groups) > 1:
            lines.append(markdown_row([f"*{group.caption}*", *[""] * (len(table.header) - 1)]))
        for name, cells in group.rows:
            lines.append(markdown_row([name, *(marks[c.mark].format(c.text) for c in cells)]))
    return [*lines, ""]
