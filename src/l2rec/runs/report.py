"""The HTML report of a run: one self-contained page, without scripts, fonts or requests.

    metrics.jsonl ──┐                 ┌─ scores, curves
    report.json ────┼─ Page ─ Jinja2 ─┼─ experts, gate, examples
    diagnostics.json┘                 └─ how to reproduce it

A note replaces each part whose data are missing. This file turns numbers into texts and
coordinates; ``report.html.j2`` holds all markup and colours.
"""

from __future__ import annotations

__all__ = ["write_report"]

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2rec.disk import write_text
from l2rec.errors import CheckpointError
from l2rec.runs.chart import (
    Chart,
    Frame,
    Line,
    Mark,
    Point,
    Tick,
    axes,
    padded,
    placed,
    rendered,
    ticks,
)
from l2rec.runs.numbers import (
    MAIN,
    METRICS,
    NONE,
    PRETRAINED,
    SIGNIFICANT,
    UNTRAINED,
    as_count,
    as_duration,
    as_large,
    as_memory,
    as_percent,
    as_probability,
    as_score,
    as_signed,
    formatted,
    is_number,
)
from l2rec.runs.remarks import LEAKY

Json = Mapping[str, Any]

CURVE_POINTS = 300
"""Most points of a drawn curve."""


def write_report(run: Path) -> Path:
    """Render RUN/report.html from the files of the run and return its path.

    Raises:
        CheckpointError: not a run folder, or a file that holds no JSON object.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a run folder; give the --out of a training")
    target = run / "report.html"
    write_text(target, rendered("runs/report.html.j2", _page(run)))
    return target


# ---------------------------------------------------------------------------- reading


def _read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file; return an empty one if the file is missing."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); evaluate the run again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; evaluate the run again")
    return value


def _read_events(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file, one a line; skip lines torn by an interruption."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


# ---------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Cell:
    """One score as text, and whether it is the best of its column."""

    text: str
    best: bool


@dataclass(frozen=True)
class Row:
    """A model's scores; ``against``: gain of the trained model over it on N@10, and p."""

    model: str
    trained: bool
    cells: list[Cell]
    against: str


@dataclass(frozen=True)
class ScoreTable:
    """Scores of all models, either with the history masked or not."""

    caption: str
    rows: list[Row]


@dataclass(frozen=True)
class SetScores:
    """Scores by the tied-day protocol; ``users``: how many of those that leave-one-out tests."""

    users: str
    tables: list[ScoreTable]


@dataclass(frozen=True)
class PartScores:
    """Scores of cold or of warm targets alone."""

    name: str
    about: str
    tables: list[ScoreTable]


@dataclass(frozen=True)
class Headline:
    """The main score, and its comparison with the best floor."""

    value: str
    lift: str
    floor: str
    verdict: str
    better: bool


@dataclass(frozen=True)
class HeatCell:
    """One expert's share: ``strength`` is its place on the colour scale, from 0 to 1."""

    x: float
    y: float
    strength: float
    text: str
    title: str


@dataclass(frozen=True)
class Heat:
    """Expert load of one view: rows are adapted matrices, columns are experts."""

    view: str
    label: str
    width: float
    height: float
    left: float
    cell_width: float
    row_height: float
    legend_y: float
    columns: list[Tick]
    rows: list[Tick]
    cells: list[HeatCell]
    show_numbers: bool
    experts: int
    uniform: str
    uniform_at: float
    top: str
    user: str
    """What the routers know of the user, in words; empty where it is not known."""
    summary: str


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """The distribution of the fusion gate over users."""

    frame: Frame
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    mean_at: float
    mean: str
    mean_anchor: str
    summary: str


@dataclass(frozen=True)
class Codes:
    """What a quantiser's codes are used for: of each level its name, the share of its codes that
    items have, its perplexity, and the share of items that share their codes so far with another.
    """

    levels: list[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Recommended:
    """One item of a recommendation list; ``hit``: it is the held-out item."""

    rank: int
    text: str
    id: str
    score: str
    hit: bool


@dataclass(frozen=True)
class Example:
    """A user's history and the items recommended for it."""

    user: str
    earlier: int
    history: list[Json]
    items: list[Recommended]
    held_out: str
    held_out_rank: int | None
    gate: str
    gate_percent: float | None


@dataclass(frozen=True)
class Page:
    """The contents of the page."""

    title: str
    subtitle: str
    split: str
    remarks: list[str]
    headline: Headline | None
    tiles: list[tuple[str, str]]
    columns: list[str]
    tables: list[ScoreTable]
    sets: SetScores | None
    parts: list[PartScores]
    compared: bool
    loss: Chart | None
    validation: Chart | None
    heats: list[Heat]
    gate: Histogram | None
    codes: Codes | None
    examples: list[Example]
    command: str
    facts: list[tuple[str, str]]
    versions: list[tuple[str, str]]


def _page(run: Path) -> Page:
    report = _read_object(run / "report.json")
    diagnostics = _read_object(run / "diagnostics.json")
    events = _read_events(run / "metrics.jsonl")
    data = report.get("dataset") or {}
    method = str(report.get("method") or run.resolve().name)
    name = f"{method}{LEAKY}" if report.get("leaky") else method
    return Page(
        title=f"{name} on {data['name']}" if data.get("name") else name,
        subtitle=str(report.get("recipe") or ""),
        split=str(report.get("split") or "test"),
        remarks=[f"{method}: {remark}" for remark in report.get("remarks") or []],
        headline=_headline(report),
        tiles=_tiles(report),
        columns=list(METRICS.values()),
        tables=_score_tables(report),
        sets=_set_scores(report.get("tied_day")),
        parts=[_part_scores(part, found) for part, found in (report.get("parts") or {}).items()],
        compared=bool(report.get("significance")),
        loss=_loss_chart(events),
        validation=_validation_chart(events, report),
        heats=_heats(diagnostics),
        gate=_histogram(diagnostics.get("gate") or {}),
        codes=_codes(diagnostics.get("codes") or {}),
        examples=[_example(example) for example in diagnostics.get("examples") or []],
        command=str(report.get("command") or ""),
        facts=_facts(report),
        versions=[(str(k), str(v)) for k, v in (report.get("versions") or {}).items()],
    )


# ---------------------------------------------------------------------------- scores


def _headline(report: Json) -> Headline | None:
    scores: Json = report.get("scores") or {}
    if not scores:
        return None
    trained, *floors = scores
    if report.get("blend"):
        floors = floors[1:]  # the first is the run that it was made of
    value = scores[trained].get(MAIN)
    # A floor that recommends what a user has already stands low where nothing repeats, and high
    # where much does: compared in the convention that suits the floors best.
    known = [
        (scores[name][key], name, key)
        for key in (MAIN, f"{MAIN}_masked")
        for name in floors
        if is_number(scores[name].get(key)) and is_number(scores[trained].get(key))
    ]
    if not is_number(value) or not known:
        return Headline(as_score(value), "", "", "", better=True)
    base, floor, key = max(known, key=lambda entry: entry[0])
    compared, masked = scores[trained][key], key != MAIN
    better = compared >= base
    return Headline(
        value=as_score(value),
        lift=f"{abs(compared / base - 1):.1%} {'above' if better else 'below'}"
        if base
        else "above",
        floor=f"{floor}, the best floor ({as_score(base)}{', history masked' if masked else ''})",
        verdict="" if masked else _verdict((report.get("significance") or {}).get(floor)),
        better=better,
    )


def _verdict(test: Json | None) -> str:
    if not test or not is_number(test.get("p")):
        return ""
    verdict = "significant" if test["p"] < SIGNIFICANT else "not significant"
    return f"{verdict} over users, {as_probability(test['p'])}"


def _tiles(report: Json) -> list[tuple[str, str]]:
    scores: Json = report.get("scores") or {}
    trained: Json = next(iter(scores.values()), {})
    backbone: Json = report.get("backbone") or {}
    tiles = [
        ("Recall@10", as_score(trained.get("recall@10"))),
        ("MRR", as_score(trained.get("mrr"))),
        ("NDCG@10, history masked", as_score(trained.get(f"{MAIN}_masked"))),
        ("catalog coverage@10", as_percent(trained.get("coverage@10"))),
        ("item texts read", as_percent((report.get("texts") or {}).get("tokens_read"))),
        ("trained parameters", as_large(backbone.get("trained_parameters"))),
        ("wall time", as_duration(report.get("wall_seconds"))),
        ("peak memory", as_memory(report.get("peak_memory_mb"))),
    ]
    return [(name, text) for name, text in tiles if text != NONE]


def _set_scores(beside: Json | None) -> SetScores | None:
    if beside is None:
        return None
    tested, left_out = beside["users_tested"], beside["users_left_out"]
    return SetScores(
        f"{as_count(tested)} of {as_count(tested + left_out)} users", _score_tables(beside)
    )


def _part_scores(part: str, found: Json) -> PartScores:
    is_cold = "that no training event and no history has" if part == "cold" else "of training"
    about = f"{as_count(found['users_tested'])} tests on items {is_cold}, ranked among all items."
    return PartScores(f"{part.capitalize()} targets", about, _score_tables(found))


def _score_tables(report: Json) -> list[ScoreTable]:
    scores: Json = report.get("scores") or {}
    tests: Json = report.get("significance") or {}
    tables = []
    for caption, suffix in (("History not masked", ""), ("History masked", "_masked")):
        keys = [metric + suffix for metric in METRICS]
        if any(is_number(row.get(key)) for row in scores.values() for key in keys):
            tables.append(ScoreTable(caption, _score_rows(scores, keys, {} if suffix else tests)))
    return tables


def _score_rows(scores: Json, keys: Sequence[str], tests: Json) -> list[Row]:
    # Scores that print alike are all bold: a difference that is not shown decides nothing.
    best = {
        key: max((as_score(row.get(key)) for row in scores.values()), key=_as_sortable)
        for key in keys
    }
    first = next(iter(scores), None)
    return [
        Row(
            model=name,
            trained=name == first,
            cells=[Cell(text := as_score(row.get(key)), text == best[key] != NONE) for key in keys],
            against=_against(tests.get(name)),
        )
        for name, row in scores.items()
    ]


def _as_sortable(text: str) -> float:
    return -math.inf if text == NONE else float(text)


def _against(test: Json | None) -> str:
    if not test:
        return ""
    return f"{as_signed(test.get('difference'))} ({as_probability(test.get('p'))})"


# ---------------------------------------------------------------------------- curves


def _curve(events: Sequence[Json], kind: str, key: str) -> list[Point]:
    return [
        (float(event["step"]), float(event[key]))
        for event in events
        if event.get("event") == kind and is_number(event.get("step")) and is_number(event.get(key))
    ]


def _thinned(points: Sequence[Point], limit: int = CURVE_POINTS) -> list[Point]:
    """Reduce a curve to at most ``limit`` points, each the mean of equally many neighbours."""
    size = max(1, math.ceil(len(points) / limit))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(_mean([x for x, _ in g]), _mean([y for _, y in g])) for g in groups]


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean of a centred window of about a twelfth of the curve, shorter at the ends."""
    reach = len(points) // 24
    out = []
    for i, (x, _) in enumerate(points):
        near = min(reach, i, len(points) - 1 - i)
        out.append((x, _mean([y for _, y in points[i - near : i + near + 1]])))
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _loss_chart(events: Sequence[Json]) -> Chart | None:
    points = _thinned(_curve(events, "train", "loss"))
    if not points:
        return None
    smooth = _smoothed(points)
    x_range = (min(0.0, points[0][0]), max(points[-1][0], 1.0))
    frame = Frame(x_range, padded([y for _, y in points]))
    x_ticks, y_ticks = axes(frame)
    start, end = smooth[0][1], smooth[-1][1]
    return Chart(
        title="Training loss",
        summary=f"Training loss over steps, from {start:.3g} to {end:.3g}, smoothed.",
        note=_parts_note(events),
        x_label="step",
        frame=frame,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=[
            Line(frame.path(points), "raw", "logged"),
            Line(frame.path(smooth), "main", "moving average"),
        ],
        marks=[],
    )


def _parts_note(events: Sequence[Json]) -> str:
    """List the named parts of the loss, averaged over the last tenth of the training."""
    parts = [
        event["parts"] for event in events if event.get("event") == "train" and event.get("parts")
    ]
    last = parts[-max(1, len(parts) // 10) :]
    names = list(last[-1]) if last else []
    means = {
        name: _mean(values)
        for name in names
        if (values := [part[name] for part in last if is_number(part.get(name))])
    }
    listed = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
    return (
        f"Means of the loss parts over the last tenth of the training: {listed}." if listed else ""
    )


def _validation_chart(events: Sequence[Json], report: Json) -> Chart | None:
    plain = _curve(events, "valid", MAIN)
    masked = _curve(events, "valid", f"{MAIN}_masked")
    # Runs of earlier versions do not say what chose: it was the score that is not masked.
    by_masked = report.get("selected_by") == f"{MAIN}_masked"
    chosen, other = (masked, plain) if by_masked else (plain, masked)
    if not chosen:
        return None
    frame = Frame(
        (min(0.0, chosen[0][0]), max(chosen[-1][0], 1.0)), padded([y for _, y in chosen + other])
    )
    x_ticks, y_ticks = axes(frame)
    best = next(
        (p for p in chosen if p[0] == report.get("best_step")), max(chosen, key=lambda p: p[1])
    )
    names = ("history masked", "history not masked")
    by, beside = names if by_masked else names[::-1]
    lines = [Line(frame.path(chosen), "main", by)]
    if other:
        lines.append(Line(frame.path(other), "second", beside))
    at_0 = PRETRAINED if PRETRAINED in (report.get("scores") or {}) else UNTRAINED
    start = f" from {chosen[0][1]:.4f} {at_0}" if chosen[0][0] == 0 else ""
    return Chart(
        title="Validation NDCG@10",
        summary=f"Validation NDCG@10, {by}, over steps,{start} to {best[1]:.4f} at step "
        f"{best[0]:,.0f}.",
        note=f"Step 0 is the model {at_0}. The best step is chosen by the score with the {by}.",
        x_label="step",
        frame=frame,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=lines,
        marks=_validation_marks(frame, chosen, best, at_0),
    )


def _validation_marks(frame: Frame, points: Sequence[Point], best: Point, at_0: str) -> list[Mark]:
    marks = []
    for point in points:
        if point == best:
            text, style = f"best {point[1]:.4f}", "best"
        elif point[0] == 0:
            text, style = f"{at_0} {point[1]:.4f}", "start"
        else:
            text, style = "", "dot"
        marks.append(placed(frame, point, text, style))
    return marks


# ---------------------------------------------------------------------------- experts and gate


def _heats(diagnostics: Json) -> list[Heat]:
    experts: Json = diagnostics.get("experts") or {}
    names = [str(name) for name in diagnostics.get("matrices") or []]
    users: Json = diagnostics.get("user_share") or {}
    return [
        _heat(str(view), shares, names, users.get(view) or [])
        for view, shares in experts.items()
        if shares
    ]


def _short_names(names: Sequence[str]) -> list[str]:
    """Return dotted module names without the pieces that all of them share."""
    pieces = [name.split(".") for name in names]
    if len(set(map(len, pieces))) != 1 or len(pieces) < 2:
        return list(names)
    differs = [len(set(column)) > 1 for column in zip(*pieces, strict=True)]
    return [
        " ".join(p for p, d in zip(row, differs, strict=True) if d) or ".".join(row)
        for row in pieces
    ]


def _user_share(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return (
        f"In what the routers decide by, the user's share is {as_percent(mean)} on average "
        f"({as_percent(min(shares))} to {as_percent(max(shares))}), the token's is the rest."
    )


def _heat(
    view: str, shares: Sequence[Sequence[float]], names: Sequence[str], users: Sequence[float]
) -> Heat:
    experts = max(len(row) for row in shares)
    uniform = 1 / experts
    top = max(2 * uniform, *(share for row in shares for share in row))
    full = [names[i] if i < len(names) else f"matrix {i + 1}" for i in range(len(shares))]
    short = _short_names(full)
    row_height = 24.0 if len(shares) <= 32 else 12.0
    left = min(150.0, 14 + 6.6 * max(len(name) for name in short))
    cell_width = (480 - left) / experts
    head = 24.0
    cells = [
        HeatCell(
            x=round(left + j * cell_width, 1),
            y=head + i * row_height,
            strength=round(max(0.0, share) / top, 3),
            text=f"{share * 100:.0f}",
            title=f"{full[i]}, expert {j + 1}: {as_percent(share)}",
        )
        for i, row in enumerate(shares)
        for j, share in enumerate(row)
    ]
    peak = max(cells, key=lambda cell: cell.strength)
    return Heat(
        view=view,
        label={"behavioral": "Behavioural"}.get(view, view.capitalize()),
        width=480,
        height=head + len(shares) * row_height + 46,
        left=left,
        cell_width=round(cell_width, 2),
        row_height=row_height,
        legend_y=head + len(shares) * row_height + 14,
        columns=[Tick(round(left + (j + 0.5) * cell_width, 1), str(j + 1)) for j in range(experts)],
        rows=[
            Tick(head + (i + 0.5) * row_height, name)
            for i, name in enumerate(short)
            if row_height > 20 or i % 2 == 0
        ],
        cells=cells,
        show_numbers=row_height > 20 and cell_width >= 26,
        experts=experts,
        uniform=f"{100 * uniform:.3g}%",
        uniform_at=round(uniform / top, 3),
        top=as_percent(top),
        user=_user_share(users),
        summary=f"Expert load of the {view} view: {len(shares)} matrices by {experts} experts. "
        f"Largest: {peak.title}.",
    )


def _histogram(gate: Json) -> Histogram | None:
    edges, counts = gate.get("bin_edges") or [], gate.get("counts") or []
    if len(edges) != len(counts) + 1 or not sum(counts):
        return None
    total = sum(counts)
    shares = [count / total for count in counts]
    frame = Frame(
        (float(edges[0]), float(edges[-1])), (0.0, max(shares) * 1.15), left=44, width=480
    )
    mean = gate.get("mean")
    mean_at = frame.x(mean) if is_number(mean) else frame.left
    return Histogram(
        frame=frame,
        bars=[_bar(frame, edges[i], edges[i + 1], share) for i, share in enumerate(shares)],
        x_ticks=[Tick(frame.x(t), f"{t:g}") for t in ticks(*frame.x_range)],
        y_ticks=[Tick(frame.y(t), f"{t:.0%}") for t in ticks(*frame.y_range, 4)],
        mean_at=mean_at,
        mean=formatted(mean, lambda v: f"{v:.2f}"),
        mean_anchor="end" if mean_at > (frame.left + frame.right) / 2 else "start",
        summary=f"Histogram of the fusion gate over {as_count(total)} users, "
        f"mean {formatted(mean, lambda v: f'{v:.2f}')}.",
    )


def _codes(codes: Json) -> Codes | None:
    of_used, of_perplexity = codes.get("used") or [], codes.get("perplexity") or []
    collisions = codes.get("collisions")
    if is_number(collisions):  # of all levels together, as earlier versions wrote
        collisions = [None] * (len(of_used) - 1) + [collisions]
    levels = list(zip(of_used, of_perplexity, collisions or [], strict=False))
    if not levels:
        return None
    return Codes(
        [
            (
                str(number),
                formatted(used, lambda v: f"{v:.1%}"),
                formatted(perplexity, lambda v: f"{v:.1f}"),
                formatted(shared, lambda v: f"{v:.1%}"),
            )
            for number, (used, perplexity, shared) in enumerate(levels, 1)
        ]
    )


def _bar(frame: Frame, low: float, high: float, share: float) -> Bar:
    x, top = frame.x(low), frame.y(share)
    return Bar(
        x=x + 1,
        y=top,
        width=round(max(frame.x(high) - x - 2, 0.5), 1),
        height=round(frame.bottom - top, 1),
        title=f"{low:.2f} to {high:.2f}: {as_percent(share)} of users",
    )


# ---------------------------------------------------------------------------- examples and facts


def _example(example: Json) -> Example:
    held_out: Json = example.get("held_out") or {}
    items = [
        Recommended(
            rank=rank,
            text=str(item.get("text") or item.get("id", "")),
            id=str(item.get("id", "")),
            score=formatted(item.get("score"), lambda v: f"{v:.3f}"),
            hit="id" in held_out and item.get("id") == held_out["id"],
        )
        for rank, item in enumerate(example.get("items") or [], start=1)
    ]
    gate = example.get("gate")
    return Example(
        user=str(example.get("user", "")),
        earlier=int(example.get("earlier") or 0),
        history=list(example.get("history") or []),
        items=items,
        held_out=str(held_out.get("text") or held_out.get("id", "")),
        held_out_rank=next((item.rank for item in items if item.hit), None),
        gate=formatted(gate, lambda v: f"{v:.2f}"),
        gate_percent=round(100 * float(gate), 1) if is_number(gate) else None,
    )


def _facts(report: Json) -> list[tuple[str, str]]:
    data: Json = report.get("dataset") or {}
    facts = [
        ("Data", _joined(data, {"users": "users", "items": "items", "events": "events"})),
        ("Data fingerprint", str(data.get("fingerprint") or "")),
        ("Protocol", str(report.get("protocol") or "")),
        ("Backbone", _backbone(report.get("backbone") or {})),
        ("Seed", str(report.get("seed", ""))),
        ("Steps", _steps(report)),
        ("Tokens seen", as_count(report.get("tokens_seen"))),
        ("Wall time", as_duration(report.get("wall_seconds"))),
        ("Peak memory", as_memory(report.get("peak_memory_mb"))),
        ("Hardware", str(report.get("hardware") or "")),
        ("Date", str(report.get("date") or "")),
    ]
    return [(name, text) for name, text in facts if text not in ("", NONE)]


def _joined(counts: Json, names: Mapping[str, str]) -> str:
    listed = [f"{as_count(counts[key])} {name}" for key, name in names.items() if key in counts]
    return ", ".join([str(counts["name"]), *listed] if counts.get("name") else listed)


def _backbone(backbone: Json) -> str:
    name = str(backbone.get("name") or "")
    parts = [
        f"{as_large(backbone.get(key))} {word}"
        for key, word in (("parameters", "parameters"), ("trained_parameters", "trained"))
        if is_number(backbone.get(key))
    ]
    return f"{name}: {', '.join(parts)}" if name and parts else name or ", ".join(parts)


def _steps(report: Json) -> str:
    steps, best = as_count(report.get("steps")), as_count(report.get("best_step"))
    return steps if best == NONE else f"{steps}, best at {best}"
