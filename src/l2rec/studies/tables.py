"""A comparison as tables, in Markdown and CSV."""

from __future__ import annotations

__all__ = [
    "Table",
    "csv_text",
    "markdown",
    "markdown_row",
    "mean_and_sd",
    "tables",
    "write_comparison",
]

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2rec.disk import write_text
from l2rec.errors import ConfigError
from l2rec.runs.numbers import (
    MAIN,
    METRICS,
    NONE,
    SIGNIFICANT,
    as_count,
    as_probability,
    as_score,
    formatted,
)
from l2rec.studies.compare import (
    BIAS,
    EVERYONE,
    LISTS,
    TESTED,
    Block,
    Comparison,
    Difference,
    Entry,
    Line,
    Score,
    family_size,
)


@dataclass(frozen=True)
class Table:
    """Cells of text; ``best`` marks those that are the best of their column."""

    title: str
    header: list[str]
    rows: list[list[str]]
    best: list[list[bool]]
    caption: str


def tables(comparison: Comparison) -> list[Table]:
    """Lay out a comparison: scores of all users, the main metrics by segment, and costs."""
    overall = [block for block in comparison.blocks if block.segment == EVERYONE]
    scores = [_overall_table(comparison, block) for block in overall]
    if len(comparison.blocks) > len(overall):
        shown = [(m, masked) for masked in (False, True) for m in TESTED]
        shown += [(metric, False) for metric in LISTS]
        scores += [_segment_table(comparison, *which) for which in shown]
    return [*(table for table in scores if table.rows), _cost_table(comparison)]


def _overall_table(comparison: Comparison, block: Block) -> Table:
    """Lay out every metric of all users, with the floors below."""
    shown = METRICS | ({} if block.masked else LISTS)
    cells, best = _marked(
        [[line.scores.get(metric) for metric in shown] for line in block.lines.values()], shown
    )
    labels = list(block.lines)
    rows = [
        [
            label,
            str(len(entry.seeds)),
            *row,
            *(_against(block.lines[label].tests.get(metric)) for metric in TESTED),
        ]
        for label, entry, row in zip(labels, comparison.entries, cells, strict=True)
    ]
    marks = [
        [label == block.best, False, *row, *[False] * len(TESTED)]
        for label, row in zip(labels, best, strict=True)
    ]
    for name, scores in comparison.floors.items():
        floor = [as_score(scores.get(f"{m}_masked" if block.masked else m)) for m in shown]
        rows.append([name, NONE, *floor, *[NONE] * len(TESTED)])
        marks.append([False] * len(rows[-1]))
    header = ["run", "seeds", *shown.values(), *(f"Δ {METRICS[m]} (p)" for m in TESTED)]
    title = f"{_data(comparison)}: test scores of {block.users:,} users, {_view(block.masked)}"
    return Table(title, header, rows, marks, _verdict(block))


def _segment_table(comparison: Comparison, metric: str, masked: bool) -> Table:
    """Lay out one metric by segment; the table has no rows if no run has the metric."""
    blocks = [block for block in comparison.blocks if block.masked == masked]
    labels = [label for label in blocks[0].lines if metric in blocks[0].lines[label].scores]
    cells, best = _marked(
        [[block.lines[label].scores.get(metric) for block in blocks] for label in labels],
        [metric] * len(blocks),
    )
    rows = [
        [
            label,
            *(
                text + _dagger(block.lines[label].tests.get(metric))
                for text, block in zip(row, blocks, strict=True)
            ),
        ]
        for label, row in zip(labels, cells, strict=True)
    ]
    header = ["run", *(f"{block.segment} ({block.users:,})" for block in blocks)]
    name = (METRICS | LISTS)[metric]
    reference = (
        f"the best by {METRICS[MAIN]}"
        if len({b.reference for b in blocks}) > 1
        else blocks[0].reference
    )
    number = f"{family_size(blocks, comparison.against):,}"
    counted = f"all {number} pairs of two rows" if comparison.against is None else f"{number} tests"
    caption = (
        f"† differs from {reference} at p < {SIGNIFICANT}, by paired t-tests over users, corrected "
        f"by Holm's method for the {counted} in all columns"
    )
    return Table(
        f"{_data(comparison)}: {name} by segment of users, {_view(masked)}",
        header,
        rows,
        [[False, *row] for row in best],
        caption if metric in TESTED and len(labels) > 1 else "",
    )


def _cost_table(comparison: Comparison) -> Table:
    """Lay out how each row was made and what it cost."""
    rows = [
        [
            e.label,
            e.method,
            " ".join(map(str, e.seeds)),
            e.backbone,
            as_count(e.trained_parameters),
            # One unit for a whole column, where `as_duration` and `as_memory` choose it by size.
            formatted(e.training_seconds, lambda seconds: f"{seconds / 60:.1f} min"),
            formatted(e.tokens_seen, lambda tokens: f"{tokens / 1e6:.1f} M"),
            formatted(e.peak_memory_mb, lambda megabytes: f"{megabytes / 1000:.2f} GB"),
            e.hardware,
        ]
        for e in comparison.entries
    ]
    header = ["run", "method", "seeds", "backbone", "trained parameters", "training"]
    header += ["tokens", "peak memory", "hardware"]
    caption = "means over seeds" if any(len(e.seeds) > 1 for e in comparison.entries) else ""
    return Table(f"{_data(comparison)}: costs", header, rows, [[False] * 9 for _ in rows], caption)


def _marked(
    scores: Sequence[Sequence[Score | None]], metrics: Sequence[str] | Mapping[str, str]
) -> tuple[list[list[str]], list[list[bool]]]:
    """Write scores as text and mark the best of each column.

    Metrics of recommendation lists have no best, nor has a table of one row.
    """
    texts = [[mean_and_sd(s, m) for s, m in zip(row, metrics, strict=True)] for row in scores]
    columns = list(zip(*scores, strict=True))
    top = [
        max((as_score(s.mean) for s in column if s is not None), default="") for column in columns
    ]
    best = [
        [
            len(scores) > 1 and m in METRICS and s is not None and as_score(s.mean) == highest
            for s, m, highest in zip(row, metrics, top, strict=True)
        ]
        for row in scores
    ]
    return texts, best


def mean_and_sd(score: Score | None, metric: str) -> str:
    """Write mean ± deviation."""
    if score is None:
        return NONE
    form = "{:+.2f}" if metric == BIAS else "{:.4f}"
    deviation = "" if score.sd is None else f" ± {form.format(score.sd).lstrip('+')}"
    return form.format(score.mean) + deviation


def _data(comparison: Comparison) -> str:
    """Name the data in the title of a table."""
    return f"{comparison.data}, fingerprint {comparison.fingerprint}"


def _view(masked: bool) -> str:
    """Say whether the history is in the ranking."""
    return "history masked" if masked else "history not masked"


def _against(test: Difference | None) -> str:
    """Write a difference and its p value."""
    return NONE if test is None else f"{test.difference:+.4f} ({as_probability(test.p)})"


def _dagger(test: Difference | None) -> str:
    """Mark a difference that is significant among all of its table."""
    return "†" if test is not None and test.p_holm is not None and test.p_holm < SIGNIFICANT else ""


def _verdict(block: Block) -> str:
    """Say by how much the best row leads its best rival, and what all rows are tested against."""
    if block.rival is None or not block.lead:
        return ""
    leads = ", ".join(f"{METRICS[m]} {_against(test)}" for m, test in block.lead.items())
    return (
        f"best by {METRICS[MAIN]}: {block.best}; against the best rival, {block.rival}: {leads}. "
        f"Δ: to {block.reference}. Two-sided paired t-tests over users, not corrected for how many "
        "there are"
    )


def markdown(comparison: Comparison) -> str:
    """Write all tables and notes as Markdown."""
    lines = [
        f"Data `{comparison.fingerprint}`; {comparison.protocol}.",
        "",
    ]
    for table in tables(comparison):
        lines += [f"### {table.title}", "", markdown_row(table.header)]
        lines.append("|---|" + "---:|" * (len(table.header) - 1))
        for row, best in zip(table.rows, table.best, strict=True):
            lines.append(
                markdown_row([f"**{c}**" if b else c for c, b in zip(row, best, strict=True)])
            )
        lines += ["", *([f"{table.caption}.", ""] if table.caption else [])]
    lines += [f"- {note}" for note in comparison.notes]
    return "\n".join(lines).rstrip() + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """Join cells into one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_text(comparison: Comparison) -> str:
    """Write one CSV record for each row, segment and view of the history, with all numbers."""
    entries = {entry.label: entry for entry in comparison.entries}
    records = [
        _record(entries[label], line, block)
        for block in comparison.blocks
        for label, line in block.lines.items()
    ]
    out = io.StringIO()
    columns = dict.fromkeys(column for record in records for column in record)
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _record(entry: Entry, line: Line, block: Block) -> dict[str, Any]:
    """Collect the CSV record of one row in one block."""
    record: dict[str, Any] = {
        "run": entry.label,
        "method": entry.method,
        "seeds": " ".join(map(str, entry.seeds)),
        "backbone": entry.backbone,
        "segment": block.segment,
        "users": block.users,
        "history": "masked" if block.masked else "not masked",
    }
    for metric, score in line.scores.items():
        record |= {metric: score.mean, f"{metric}_sd": score.sd}
    record["reference"] = block.reference
    for metric, test in line.tests.items():
        numbers = {"difference": test.difference, "p": test.p, "p_holm": test.p_holm}
        record |= {f"{metric}_{name}": value for name, value in numbers.items()}
    costs = ("trained_parameters", "training_seconds", "tokens_seen", "peak_memory_mb", "hardware")
    return record | {cost: getattr(entry, cost) for cost in costs}


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a comparison to a file, as Markdown or CSV by its ending.

    Raises:
        ConfigError: the name ends in neither ``.md`` nor ``.csv``.
    """
    render = {".md": markdown, ".csv": csv_text}.get(path.suffix)
    if render is None:
        raise ConfigError(f"--out {path}: choose a name that ends in .md or .csv")
    write_text(path, render(comparison))
