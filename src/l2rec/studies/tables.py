"""A comparison as tables, in Markdown and CSV."""

from __future__ import annotations

__all__ = ["Table", "csv_text", "markdown", "tables", "write_comparison"]

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2rec.disk import write_text
from l2rec.errors import ConfigError
from l2rec.studies.compare import (
    BIAS,
    EVERYONE,
    LISTS,
    MAIN,
    METRICS,
    NONE,
    SIGNIFICANT,
    TESTED,
    Block,
    Comparison,
    Difference,
    Entry,
    Line,
    Score,
    _probability,
)


@dataclass(frozen=True)
class Table:
    """Cells of text, and which of them are the best of their column."""

    title: str
    header: list[str]
    rows: list[list[str]]
    best: list[list[bool]]
    caption: str


def tables(comparison: Comparison) -> list[Table]:
    """Scores of everyone, each metric that matters by segment, and costs."""
    overall = [block for block in comparison.blocks if block.segment == EVERYONE]
    found = [_overall_table(comparison, block) for block in overall]
    if len(comparison.blocks) > len(overall):
        shown = [(m, masked) for masked in (False, True) for m in TESTED]
        shown += [(metric, False) for metric in LISTS]
        found += [_segment_table(comparison, *which) for which in shown]
    return [*(table for table in found if table.rows), _cost_table(comparison)]


def _overall_table(comparison: Comparison, block: Block) -> Table:
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
        of_view = [scores.get(f"{m}_masked" if block.masked else m) for m in shown]
        floor = [NONE if v is None else f"{v:.4f}" for v in of_view]
        rows.append([name, NONE, *floor, *[NONE] * len(TESTED)])
        marks.append([False] * len(rows[-1]))
    header = ["run", "seeds", *shown.values(), *(f"Δ {METRICS[m]} (p)" for m in TESTED)]
    title = f"{comparison.data}: test scores of {block.users:,} users, {_view(block.masked)}"
    return Table(title, header, rows, marks, _verdict(block))


def _segment_table(comparison: Comparison, metric: str, masked: bool) -> Table:
    """Rows and segments of one metric; no rows where no run has it."""
    blocks = [block for block in comparison.blocks if block.masked == masked]
    labels = [label for label in blocks[0].lines if metric in blocks[0].lines[label].scores]
    cells, best = _marked(
        [[block.lines[label].scores[metric] for block in blocks] for label in labels],
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
    told = (
        f"the best by {METRICS[MAIN]}"
        if len({b.reference for b in blocks}) > 1
        else blocks[0].reference
    )
    caption = f"† differs from {told} at p < {SIGNIFICANT}" if metric in TESTED else ""
    return Table(
        f"{comparison.data}: {name} by segment of users, {_view(masked)}",
        header,
        rows,
        [[False, *row] for row in best],
        caption if len(labels) > 1 else "",
    )


def _cost_table(comparison: Comparison) -> Table:
    rows = [
        [
            e.label,
            e.method,
            " ".join(map(str, e.seeds)),
            e.backbone,
            _number(e.trained_parameters, "{:,.0f}"),
            _number(e.training_seconds, "{:.1f} min", 60),
            _number(e.tokens_seen, "{:.1f} M", 1e6),
            _number(e.peak_memory_mb, "{:.2f} GB", 1000),
            e.hardware,
        ]
        for e in comparison.entries
    ]
    header = ["run", "method", "seeds", "backbone", "trained parameters", "training"]
    header += ["tokens", "peak memory", "hardware"]
    caption = "means over seeds" if any(len(e.seeds) > 1 for e in comparison.entries) else ""
    return Table(f"{comparison.data}: costs", header, rows, [[False] * 9 for _ in rows], caption)


def _marked(
    scores: Sequence[Sequence[Score | None]], metrics: Sequence[str] | Mapping[str, str]
) -> tuple[list[list[str]], list[list[bool]]]:
    """Scores as text, and which are the best of their column (none of lists, none of one row)."""
    texts = [[_text(s, m) for s, m in zip(row, metrics, strict=True)] for row in scores]
    columns = list(zip(*scores, strict=True))
    top = [
        max((f"{s.mean:.4f}" for s in column if s is not None), default="") for column in columns
    ]
    best = [
        [
            len(scores) > 1 and m in METRICS and s is not None and f"{s.mean:.4f}" == highest
            for s, m, highest in zip(row, metrics, top, strict=True)
        ]
        for row in scores
    ]
    return texts, best


def _text(score: Score | None, metric: str) -> str:
    if score is None:
        return NONE
    form = "{:+.2f}" if metric == BIAS else "{:.4f}"
    deviation = "" if score.sd is None else f" ± {form.format(score.sd).lstrip('+')}"
    return form.format(score.mean) + deviation


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return NONE if value is None else form.format(value / unit)


def _view(masked: bool) -> str:
    return "history masked" if masked else "history not masked"


def _against(test: Difference | None) -> str:
    return NONE if test is None else f"{test.difference:+.4f} ({_probability(test.p)})"


def _dagger(test: Difference | None) -> str:
    return "†" if test is not None and test.p < SIGNIFICANT else ""


def _verdict(block: Block) -> str:
    """What the best is worth against its best rival, and what the differences are to."""
    if block.rival is None or not block.lead:
        return ""
    leads = ", ".join(f"{METRICS[m]} {_against(test)}" for m, test in block.lead.items())
    return (
        f"best by {METRICS[MAIN]}: {block.best}; against the best rival, {block.rival}: {leads}. "
        f"Δ: to {block.reference}. Two-sided paired t-tests over users, not corrected for how many "
        "there are"
    )


def markdown(comparison: Comparison) -> str:
    """All tables and notes as Markdown."""
    lines = [
        f"Data `{comparison.fingerprint}`; {comparison.protocol}.",
        "",
    ]
    for table in tables(comparison):
        lines += [f"### {table.title}", "", _cells(table.header)]
        lines.append("|---|" + "---:|" * (len(table.header) - 1))
        for row, best in zip(table.rows, table.best, strict=True):
            lines.append(_cells([f"**{c}**" if b else c for c, b in zip(row, best, strict=True)]))
        lines += ["", *([f"{table.caption}.", ""] if table.caption else [])]
    lines += [f"- {note}" for note in comparison.notes]
    return "\n".join(lines).rstrip() + "\n"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def csv_text(comparison: Comparison) -> str:
    """One record for each row, segment and view of the history, with everything that is known."""
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
        record |= {f"{metric}_difference": test.difference, f"{metric}_p": test.p}
    costs = ("trained_parameters", "training_seconds", "tokens_seen", "peak_memory_mb", "hardware")
    return record | {cost: getattr(entry, cost) for cost in costs}


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write ``.md`` or ``.csv``; ConfigError for another ending."""
    render = {".md": markdown, ".csv": csv_text}.get(path.suffix)
    if render is None:
        raise ConfigError(f"--out {path}: choose a name that ends in .md or .csv")
    write_text(path, render(comparison))
