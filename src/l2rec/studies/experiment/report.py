"""The page of an experiment: ``report.md`` and one self-contained ``report.html``.

finished cells ── results.py ── Page ─┬─ report.md
experiment, plan ─────────────────────┴─ report.html     (studies/page.py)
"""

from __future__ import annotations

__all__ = ["page", "to_json", "write_page"]

import datetime
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2rec.config import method_class
from l2rec.data.dataset import open_dataset
from l2rec.runs.chart import Chart
from l2rec.runs.folder import cut_by_time
from l2rec.runs.machine import versions
from l2rec.runs.numbers import (
    METRICS,
    NONE,
    as_count,
    as_probability,
    as_score,
    as_signed,
    formatted,
)
from l2rec.runs.remarks import LEAKY, remarks_of, together
from l2rec.studies.compare import FLOORS
from l2rec.studies.experiment.definition import BLENDED, MASKED, Experiment, Published
from l2rec.studies.experiment.plan import LeftOut, Plan, State, claim, read_state, seconds_of
from l2rec.studies.experiment.results import (
    Compared,
    Done,
    Results,
    compared,
    read_results,
    score_of,
)
from l2rec.studies.page import (
    BEST,
    PLAIN,
    SECOND,
    Cell,
    Group,
    Made,
    Page,
    Section,
    Table,
    chart_of,
    write,
)
from l2rec.studies.tables import mean_and_sd

STATISTICS = {
    "users": "users",
    "items": "items",
    "events": "interactions",
    "mean_history": "per user",
    "density": "density",
}
"""Heading of each count of a data set."""
HOURS = "training_hours"
"""A published cost."""


def page(planned: Plan, price: float | None = None) -> Page:
    """Collect the page of an experiment from what is finished.

    price: of an hour of the machine, for a column of what each cell cost.
    """
    experiment = planned.experiment
    results = read_results(planned)
    tests = compared(planned, results)
    package = versions()
    commit = f", commit {package['commit']}" if "commit" in package else ""
    return Page(
        title=experiment.title,
        reproduces=experiment.reproduces,
        about=" ".join(experiment.about.split()),
        made=f"{datetime.date.today().isoformat()}, l2rec {package['l2rec']}{commit}",
        sections=[_section(experiment, grid, lines, price) for grid, lines in results.items()]
        or ([_statistics(planned)] if experiment.statistics else []),
        comparisons=_comparison_table(tests) if tests else None,
        compared_how=_how_compared(tests),
        published=None if experiment.published is None else _published(experiment.published),
        cells=_made(planned, results),
        unfinished=_unfinished(planned),
    )


def write_page(planned: Plan, price: float | None = None) -> tuple[Page, list[Path]]:
    """Write ``report.md`` and ``report.html`` of what is finished; return the page and both paths.

    Raises:
        CheckpointError: a finished cell or the folder that cannot be read or written, or a folder
            that holds something else.
    """
    claim(planned)
    contents = page(planned, price)
    return contents, write(contents, planned.out)


def to_json(planned: Plan) -> dict[str, Any]:
    """Return scores, comparisons and what is unfinished as plain values."""
    experiment = planned.experiment
    results = read_results(planned)
    names = [metric + ending for metric in experiment.metrics for ending in ("", MASKED)]
    scores = {
        grid: {
            line: {
                "seeds": [list(one.cell.seeds) for one in done],
                **{n: None if (s := score_of(done, n)) is None else asdict(s) for n in names},
            }
            for line, done in lines.items()
        }
        for grid, lines in results.items()
    }
    tests = [
        {
            "a": one.comparison.a,
            "b": one.comparison.b,
            "metric": one.comparison.metric,
            "data": one.grid,
            "seeds": list(one.seeds),
            **({} if one.test is None else asdict(one.test)),
            "p_holm": one.p_holm,
            "notes": list(one.notes),
        }
        for one in compared(planned, results)
    ]
    return {
        "title": experiment.title,
        "scores": scores,
        "remarks": {
            grid: {line: found for line, found in _remarks(lines).items() if found}
            for grid, lines in results.items()
        },
        "comparisons": tests,
        "unfinished": dict(_unfinished(planned)),
    }


# -- tables --------------------------------------------------------------------------------------


def _section(
    experiment: Experiment,
    grid: str,
    lines: Mapping[str, Sequence[Done]],
    price: float | None,
) -> Section:
    """Lay out the results on one data set."""
    first = next(iter(lines.values()))[0]
    report, data = first.report, first.report["dataset"]
    facts = (
        f"{data['users']:,} users, {data['items']:,} items, {data['events']:,} events, "
        f"fingerprint {data['fingerprint']}; {report.get('protocol', '')}"
    )
    if first.part:
        facts += f"; {report['parts'][first.part]['users_tested']:,} tests"
    backbones = _backbones(lines)
    if backbones:
        facts += f"; {'backbones' if len(backbones) > 1 else 'backbone'} {_named(backbones)}"
    notes = ["mean ± standard deviation over seeds; best of each column bold, second underlined"]
    if price is not None:
        notes.append(
            f"money: all of a cell's time, validation and test too, at {price:g} an hour of the "
            "machine that it ran on; of a blend or an average, what it adds to its runs"
        )
    if experiment.improvement:
        notes.append(
            "improvement: over the best of the other rows of the same part of the table, in each "
            "column; of the paper, over the best other figure of its table"
        )
    if any(cut_by_time(one.report) for done in lines.values() for one in done):
        notes.append("† cut by its time budget while it still got better")
    notes += together(_remarks(lines))
    published = experiment.published
    known = {} if published is None else published.figures
    versions_of = {} if published is None else published.versions
    of_paper = known.get(versions_of.get(data["name"], data["name"]), {})
    if published is not None and of_paper:
        notes.append(f"“paper”: {published.source}. {' '.join(published.data.split())}")
        others = [b for b in backbones if b not in (published.backbone, *published.backbones)]
        if published.backbone and others:
            notes.append(
                f"“paper” has {published.backbone}, rows here have {', '.join(others)}: compare "
                "the order of rows, not numbers"
            )
    return Section(
        title=grid,
        facts=facts,
        table=_score_table(experiment, lines, of_paper, price),
        chart=_chart(experiment, lines),
        notes=notes,
    )


def _remarks(lines: Mapping[str, Sequence[Done]]) -> dict[str, list[str]]:
    """Return what to know beside the scores of each row."""
    return {
        name: remarks_of(config for one in done for config in one.cell.trained)
        for name, done in lines.items()
    }


def _score_table(
    experiment: Experiment,
    lines: Mapping[str, Sequence[Done]],
    of_paper: Mapping[str, Mapping[str, float]],
    price: float | None,
) -> Table:
    """Lay out scores and costs, what is blended apart from what is not."""
    metrics = [m + ending for ending in ("", MASKED) for m in experiment.metrics]
    shown = [m for m in experiment.metrics if any(m in row for row in of_paper.values())]
    header = ["", "seeds", *map(_heading, metrics), *(f"{_heading(m)}, paper" for m in shown)]
    header += ["training", "tokens", "peak memory", "trained"]
    header += [] if price is None else ["money"]
    published = _published_names(experiment, lines)
    groups = []
    for blended, caption in ((False, "as it is"), (True, "blended: co-occurrence and repeats")):
        part = {name: d for name, d in lines.items() if name.endswith(BLENDED) == blended}
        if not part:
            continue
        scores = {name: [score_of(done, m) for m in metrics] for name, done in part.items()}
        means = {n: [None if s is None else s.mean for s in row] for n, row in scores.items()}
        marked = _marked(list(means.values()))
        rows = []
        for (name, done), marks in zip(part.items(), marked, strict=True):
            cells = [
                Cell(mean_and_sd(score, metric), mark)
                for score, metric, mark in zip(scores[name], metrics, marks, strict=True)
            ]
            theirs = {} if blended else of_paper.get(published.get(name, ""), {})
            cells = [Cell(_seeds(experiment, done)), *cells]
            cells += [Cell(as_score(theirs.get(metric))) for metric in shown]
            dagger = " †" if any(cut_by_time(one.report) for one in done) else ""
            leaky = LEAKY * any(one.is_leaky for one in done)
            label = name.removesuffix(BLENDED) + leaky + dagger
            rows.append((label, [*cells, *_costs(done, price)]))
        paper = {} if blended else of_paper
        fair = {n: row for n, row in means.items() if not any(one.is_leaky for one in part[n])}
        for name, texts in _improvements(experiment, fair, paper, published, shown).items():
            blank = [Cell("")] * (len(header) - 2 - len(texts))
            rows.append((f"{name}, improvement", [Cell(""), *map(Cell, texts), *blank]))
        groups.append(Group(caption, rows))
    floors = _floors(lines)
    if floors:
        rest = [Cell("")] * (len(header) - 2 - len(metrics))
        rows = [
            (name, [Cell(NONE), *(Cell(as_score(s.get(m))) for m in metrics), *rest])
            for name, s in floors.items()
        ]
        groups.append(Group("nothing trained", rows))
    return Table(header, groups)


def _published_names(experiment: Experiment, lines: Mapping[str, Sequence[Done]]) -> dict[str, str]:
    """Return the names of rows among the published figures, of the backbones they have here."""
    published = experiment.published
    if published is None:
        return {}
    return {
        name: published.name_of(done[0].cell.row, next(iter(_backbones_of(done[0])), None))
        for name, done in lines.items()
        if not name.endswith(BLENDED)
    }


def _backbones_of(done: Done) -> list[str]:
    """Return the backbones that a cell, or what it is made of, reads."""
    trained = done.cell.trained
    found = [c.backbone.name for c in trained if method_class(c.method).uses_backbone]
    return list(dict.fromkeys(found))


def _backbones(lines: Mapping[str, Sequence[Done]]) -> dict[str, list[str]]:
    """Return the rows of a table, without blends, by their backbone."""
    rows: dict[str, list[str]] = {}
    for name, done in lines.items():
        if not name.endswith(BLENDED):
            for backbone in _backbones_of(done[0]):
                rows.setdefault(backbone, []).append(name)
    return rows


def _named(backbones: Mapping[str, Sequence[str]]) -> str:
    """Write the backbones of a table, and where there are several which rows have them."""
    if len(backbones) == 1:
        return next(iter(backbones))
    return ", ".join(f"{one} ({', '.join(rows)})" for one, rows in backbones.items())


def _improvements(
    experiment: Experiment,
    means: Mapping[str, Sequence[float | None]],
    of_paper: Mapping[str, Mapping[str, float]],
    published: Mapping[str, str],
    shown: Sequence[str],
) -> dict[str, list[str]]:
    """Write the improvement of every row that an experiment asks for, in each column of a part of
    the table and, for the metrics that are ``shown`` of it, of the paper's.
    """
    lines = {line.removesuffix(BLENDED): row for line, row in means.items()}
    ours = [name for name in experiment.improvement if name in lines]
    of_ours = {published[name] for name in experiment.improvement if name in published}
    found = {}
    columns = [
        dict(zip(lines, values, strict=True)) for values in zip(*lines.values(), strict=True)
    ]
    for name in ours:
        texts = [_improvement(column, name, experiment.improvement) for column in columns]
        for metric in shown:
            column = {n: row.get(metric) for n, row in of_paper.items()}
            texts.append(_improvement(column, published.get(name, ""), of_ours))
        found[name] = texts
    return found


def _improvement(column: Mapping[str, float | None], name: str, ours: Collection[str]) -> str:
    """Write by how much a row is above the best of a column that is none of ``ours``."""
    own = column.get(name)
    best = max((v for n, v in column.items() if n not in ours and v is not None), default=0.0)
    return NONE if own is None or not best else _percent(own - best, best)


def _heading(metric: str) -> str:
    return METRICS[metric.removesuffix(MASKED)] + (" masked" if metric.endswith(MASKED) else "")


def _seeds(experiment: Experiment, done: Sequence[Done]) -> str:
    planned = len(experiment.groups_of(done[0].cell.row))
    return str(planned) if len(done) == planned else f"{len(done)} of {planned}"


def _marked(rows: Sequence[Sequence[float | None]]) -> list[list[str]]:
    """Mark the best and second best of every column, as printed; of one row nothing."""

    def marks(column: Sequence[float | None]) -> list[str]:
        texts = [as_score(value) for value in column]
        ranked = sorted({text for text in texts if text != NONE}, key=float, reverse=True)
        named = dict(zip(ranked, (BEST, SECOND), strict=False)) if len(texts) > 1 else {}
        return [named.get(text, PLAIN) for text in texts]

    columns = [marks(column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _costs(done: Sequence[Done], price: float | None) -> list[Cell]:
    """Write mean costs: training minutes, tokens, peak memory, trained parameters, and money where
    an hour has a ``price``.
    """

    def mean(cost: Callable[[Mapping[str, Any]], Any], write: Callable[[float], str]) -> Cell:
        costs = [cost(one.report) for one in done]
        return Cell(NONE if None in costs else formatted(sum(costs) / len(costs), write))

    money = [mean(seconds_of, lambda v: f"{v / 3600 * price:.2f}")] if price is not None else []
    return [
        mean(lambda r: r.get("training_seconds"), lambda v: f"{v / 60:.1f} min"),
        mean(lambda r: r.get("tokens_seen"), lambda v: f"{v / 1e6:.1f} M"),
        mean(lambda r: r.get("peak_memory_mb"), lambda v: f"{v / 1000:.2f} GB"),
        mean(lambda r: (r.get("backbone") or {}).get("trained_parameters"), as_count),
        *money,
    ]


def _floors(lines: Mapping[str, Sequence[Done]]) -> dict[str, Mapping[str, float]]:
    """Return the scores of the baselines without training: they are the same in all reports."""
    scores: dict[str, Mapping[str, float]] = {}
    for done in lines.values():
        for one in done:
            scores |= {n: s for n, s in one.scores.items() if n in FLOORS}
    return {name: scores[name] for name in FLOORS if name in scores}


def _published(published: Published) -> Section:
    """Lay out all figures of the paper, those of data sets that are not here too."""
    groups, metrics = [], list(dict.fromkeys(_metrics_of(published)))
    for data, rows in published.figures.items():
        texts = [
            (name, [Cell(_figure(metric, row.get(metric))) for metric in metrics])
            for name, row in rows.items()
        ]
        groups.append(Group(data, texts))
    known = METRICS | STATISTICS | {HOURS: "training, hours"}
    heads = [known.get(metric, metric) for metric in metrics]
    notes = [" ".join(published.data.split())]
    return Section(published.source, "", Table(["", *heads], groups), None, notes)


def _metrics_of(published: Published) -> Iterable[str]:
    for rows in published.figures.values():
        for row in rows.values():
            yield from row


def _figure(name: str, value: float | None) -> str:
    """Write a metric, a count of `STATISTICS` or a cost."""
    forms = dict.fromkeys(("users", "items", "events"), "{:,.0f}")
    forms |= {"mean_history": "{:.2f}", "density": "{:.1e}", HOURS: "{:.2f}"}
    return formatted(value, forms.get(name, "{:.4f}").format)


def _statistics(planned: Plan) -> Section:
    """Count the data sets, as Table 1 of a paper does."""
    rows, fingerprints = [], []
    for data in planned.data:
        facts = open_dataset(data.path).describe()
        facts["mean_history"] = facts["events"] / facts["users"]
        rows.append((data.name, [Cell(_figure(key, facts[key])) for key in STATISTICS]))
        fingerprints.append(f"{data.name} {data.fingerprint}")
    table = Table(["", *STATISTICS.values()], [Group("data sets", rows)])
    return Section("Statistics", f"fingerprints: {', '.join(fingerprints)}", table, None, [])


# -- comparisons ---------------------------------------------------------------------------------


def _comparison_table(tests: Sequence[Compared]) -> Table:
    """Lay out the named comparisons, a group for each data set."""
    header = ["", "metric", "seeds", "difference", "standard error", "of users", "of seeds"]
    header += ["p", "p (Holm)", ""]
    groups: dict[str, list[tuple[str, list[Cell]]]] = {}
    for one in tests:
        what, test = one.comparison, one.test
        name = f"{what.a} against {what.b}"
        texts = [_heading(what.metric), f"{one.seeds[0]} / {one.seeds[1]}"]
        if test is None:
            texts += [NONE] * 6
        else:
            relative = f" ({_percent(test.difference, test.mean_b)})" if test.mean_b else ""
            texts.append(as_signed(test.difference) + relative)
            errors = (test.standard_error, test.users_error, test.seeds_error)
            texts += [*map(as_score, errors), as_probability(test.p), as_probability(one.p_holm)]
        notes = [*([what.about] if what.about else []), *one.notes]
        groups.setdefault(one.grid, []).append((name, [*map(Cell, texts), Cell("; ".join(notes))]))
    return Table(header, [Group(grid, rows) for grid, rows in groups.items()])


def _percent(difference: float, base: float) -> str:
    return f"{difference / base:+.1%}".replace("-", "−")


def _how_compared(tests: Sequence[Compared]) -> str:
    count = sum(one.p_holm is not None for one in tests)
    return (
        "Named before they were run. Differences of each user's mean over seeds; squared standard "
        "error: variance over users / users + variance over seeds / seeds, of either side; "
        "two-sided t-test with Satterthwaite's degrees of freedom; Holm's correction for the "
        f"number of tests of this experiment that have a p: {count}."
    )


# -- the figure ----------------------------------------------------------------------------------


def _chart(experiment: Experiment, lines: Mapping[str, Sequence[Done]]) -> Chart | None:
    """Draw the metric of the figure over x, a line for each series."""
    figure = experiment.figure
    if figure is None:
        return None
    series: dict[str, dict[float, float]] = {}
    for line, done in lines.items():
        row, score = done[0].cell.row, score_of(done, figure.y)
        if row.x is not None and score is not None and not line.endswith(BLENDED):
            series.setdefault(row.series or "ours", {})[row.x] = score.mean
    if not series:
        return None
    best = max(y for points in series.values() for y in points.values())
    return chart_of(
        series,
        title=_heading(figure.y),
        summary=f"{_heading(figure.y)} over {figure.x}: {', '.join(series)}; best {best:.4f}.",
        note="Means over seeds.",
        x_label=figure.x,
        log=figure.log,
    )


# -- how it was made -----------------------------------------------------------------------------


def _made(planned: Plan, results: Results) -> list[Made]:
    """Say of every cell in the tables by which command, where and when it was made."""
    taken = read_state(planned.out)["taken"]
    cells = [
        one for lines in results.values() for done in lines.values() for one in done if not one.part
    ]
    return [
        Made(
            name=one.cell.key,
            command=str(one.report.get("command") or "not recorded"),
            facts="; ".join(
                filter(
                    None,
                    [
                        taken.get(one.cell.key, ""),
                        f"stopped by {one.report['stopped']}" if one.report.get("stopped") else "",
                        str(one.report.get("hardware") or ""),
                        str(one.report.get("date") or ""),
                        f"commit {(one.report.get('versions') or {}).get('commit', 'unknown')}",
                        f"data {one.report['dataset']['fingerprint']}",
                    ],
                )
            ),
        )
        for one in cells
    ]


def _unfinished(planned: Plan) -> list[tuple[str, str]]:
    """Say of every cell that is not finished why: it failed, is in the way, missing, left out."""
    failed = read_state(planned.out)["failed"]
    found: list[tuple[str, str]] = []
    for one in planned.cells:
        if one.state is State.FINISHED:
            continue
        if one.cell.key in failed:
            found.append((one.cell.key, f"failed: {failed[one.cell.key]}"))
        elif one.note:
            found.append((one.cell.key, f"{one.state}: {one.note}"))
        else:
            found.append((one.cell.key, str(one.state)))
    return [*found, *map(_reason, planned.left_out)]


def _reason(left_out: LeftOut) -> tuple[str, str]:
    return left_out.key, f"left out: {left_out.reason}"
