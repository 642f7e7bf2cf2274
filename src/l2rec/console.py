"""Output of the command line: tables, and progress as bars on a terminal or as plain lines."""

from __future__ import annotations

__all__ = [
    "Console",
    "print_comparison",
    "print_doctor",
    "print_exposure",
    "print_plan",
    "print_recommendations",
    "print_rows",
    "print_table",
    "print_trials",
]

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import markup
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from l2rec.runs.numbers import NONE, as_count, as_percent, as_score, formatted

if TYPE_CHECKING:
    from l2rec.runs.predictor import Recommendation
    from l2rec.studies.compare import Comparison
    from l2rec.studies.experiment.plan import Plan
    from l2rec.studies.tune import Trial

PLAIN_EVERY = 15.0
"""Seconds between progress lines where there is no terminal."""
WIDE = 240
"""Columns of tables that are written to a file."""
SHOWN = ("recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked", "coverage@10")
"""Metrics of `print_rows`."""
HISTORY_SHOWN = 10
"""Newest items of a history that are printed."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal takes for commands, and a text of a catalog should not give it."""


def escape(text: str) -> str:
    """Return a text as it is to be read, whatever a terminal or Rich's markup make of it."""
    return markup.escape(CONTROL.sub(" ", text))


def named(dataset: Mapping[str, Any]) -> str:
    """Return how a data set is named beside its scores."""
    return f"{dataset['name']}, fingerprint {dataset['fingerprint']}"


def _rest() -> Column:
    """Return a column that takes the width that the others leave, and is cut there."""
    return Column(ratio=1, no_wrap=True, overflow="ellipsis")


class Console:
    """Progress of training and evaluation (a `protocols.Progress`), on standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = RichConsole(stderr=True, quiet=quiet, highlight=False, emoji=False)
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = terminal and not quiet
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", table_column=_rest()),
            console=self._console,
            expand=True,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last = 0.0
        self._seen: deque[tuple[int, float]] = deque(maxlen=10)
        """Steps and times of the newest plain lines: the duration of a step differs by stage."""
        self._ranking: tuple[int, float] | None = None
        """Users and time as a ranking began."""

    def __enter__(self) -> Console:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(CONTROL.sub(" ", text), soft_wrap=True, markup=False)

    def training(self, epoch: float, step: int, total: int, text: str) -> None:
        """Show that step ``step`` of ``total`` is done."""
        if self._live:
            self._bar("training", step, total, f"epoch {epoch:.2f}  {text}")
        elif time.monotonic() - self._last > PLAIN_EVERY:
            self._last = time.monotonic()
            if self._seen and step < self._seen[-1][0]:  # another run began, as in a search
                self._seen.clear()
            self._seen.append((step, self._last))
            done, seconds = step - self._seen[0][0], self._last - self._seen[0][1]
            left = seconds / done * (total - step) / 60 if done else 0.0
            about = f"  ~{left:.0f} min left" if done else ""
            self.line(f"step {step}/{total}  epoch {epoch:.2f}  {text}{about}")

    def validating(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` users are ranked."""
        if self._live:
            self._bar("ranking users", done, total, "")
            if done >= total:
                self._bars.remove_task(self._tasks.pop("ranking users"))
            return
        now = time.monotonic()
        if self._ranking is None or done < self._ranking[0]:
            self._ranking = done, now
        first, began = self._ranking
        if done >= total:
            self._ranking = None
        elif done > first and now - max(self._last, began) > PLAIN_EVERY:
            self._last = now
            left = (now - began) / (done - first) * (total - done) / 60
            self.line(f"ranking users {done:,}/{total:,}  ~{left:.0f} min left")

    def _bar(self, name: str, done: int, total: int, text: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, text=text)
        self._bars.update(self._tasks[name], completed=done, total=total, text=text)

    def scores(self, report: Mapping[str, Any]) -> None:
        """Print the score tables of a report on standard output."""
        data = named(report["dataset"])
        self._scores(f"test scores, {data}", report["scores"])
        if (sets := report.get("tied_day")) is not None:
            title = f"the same by the tied-day protocol, {sets['users_tested']:,} users"
            self._scores(f"{title}, {data}", sets["scores"])
        for part, found in report.get("parts", {}).items():
            title = f"{part} targets, {found['users_tested']:,} tests, {data}"
            self._scores(title, found["scores"])
        for remark in report.get("remarks", ()):
            _note(f"{report['method']}: {remark}")

    def _scores(self, title: str, scores_of: Mapping[str, Mapping[str, float]]) -> None:
        table = Table(title=escape(title))
        keys = ["recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked"]
        table.add_column("model", no_wrap=True)
        for key in keys:
            table.add_column(key.replace("_masked", " (masked)"), justify="right")
        for name, scores in scores_of.items():
            table.add_row(name, *(f"{scores[key]:.4f}" for key in keys))
        _out().print(table)


def _out() -> RichConsole:
    return RichConsole(file=sys.stdout, highlight=False, emoji=False)


def print_table(title: str, facts: Mapping[str, Any]) -> None:
    """Print names and values on standard output, nested values on one line; nothing is left out
    but what is None or empty.
    """
    table = Table(title=escape(title), show_header=False)
    table.add_column("name")
    table.add_column("value", overflow="fold")
    for name, value in facts.items():
        if not _empty(value):
            table.add_row(escape(str(name)), escape(_shown(value)))
    _out().print(table)


def print_trials(trials: Sequence[Trial], dataset: Mapping[str, Any]) -> None:
    """Print the trials of a search on standard output, best first."""
    table = Table(title=escape(f"validation, best first, {named(dataset)}"))
    for name in ("trial", "ndcg@10 masked", "ended by"):
        table.add_column(name, justify="left" if name == "ended by" else "right")
    keys = list(trials[0].options)
    for key in keys:
        table.add_column(escape(key), justify="right")
    for trial in trials:
        score = "–" if trial.score is None else f"{trial.score:.4f}"
        drawn = [escape(_shown(trial.options.get(key))) for key in keys]
        table.add_row(str(trial.number), score, escape(trial.state), *drawn)
    _out().print(table)


def print_rows(title: str, name: str, rows: Mapping[Any, Mapping[str, float]]) -> None:
    """Print scores by row on standard output; the best of each column is bold."""
    table = Table(title=escape(title))
    table.add_column(name)
    for metric in SHOWN:
        table.add_column(metric.replace("_", " "), justify="right")
    best = {metric: max(scores[metric] for scores in rows.values()) for metric in SHOWN}
    for row, scores in rows.items():
        cells = [f"{scores[m]:.4f}" for m in SHOWN]
        marked = [
            f"[bold]{cell}[/bold]" if scores[m] == best[m] else cell
            for m, cell in zip(SHOWN, cells, strict=True)
        ]
        table.add_row(escape(str(row)), *marked)
    _out().print(table)


def print_exposure(report: Mapping[str, Any]) -> None:
    """Print what `l2rec diagnose` found: a table for each attribute, and how to read it."""
    for what, columns in EXPOSURE.items():
        for name, rows in report[what].items():
            table = Table(title=escape(f"{what} by {name}, {named(report['dataset'])}"))
            table.add_column("group", overflow="fold")
            for heading in columns:
                table.add_column(heading, justify="right")
            for row in rows:
                table.add_row(escape(row["group"]), *(write(row) for write in columns.values()))
            _out().print(table)
    for pair in report["both"]:
        if pair["users"] == "all":
            apart = f"{pair['groups'][0]['calibration']:.3f}"
            _out().print(f"calibration by {escape(pair['items'])}: {apart}", highlight=False)
            continue
        title = f"places by {pair['users']} and {pair['items']}, ratio to history"
        table = Table(title=escape(title))
        table.add_column("group", overflow="fold")
        for group in pair["groups"]:
            table.add_column(escape(group["group"]), justify="right")
        for name in pair["groups"][0]["shares"]:
            cells = [group["shares"][name] for group in pair["groups"]]
            table.add_row(
                escape(name), *(f"{as_percent(c['exposure'])} {_times(c['ratio'])}" for c in cells)
            )
        table.add_row("calibration", *(f"{g['calibration']:.3f}" for g in pair["groups"]))
        _out().print(table)
    overall = report["overall"]
    _out().print(
        f"{report['cases']:,} test cases, lists of {report['k']}: "
        f"{as_percent(overall['coverage'])} of the catalog is in some list, Gini "
        f"{overall['gini']:.2f}; the fifth with the most events has "
        f"{as_percent(overall['head_exposure'])} of the places, "
        f"{as_percent(overall['head_history'])} of the histories and "
        f"{as_percent(overall['head_next'])} of what was chosen next.",
        highlight=False,
    )


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"×{ratio:.2f}"


def _with_error(row: Mapping[str, Any]) -> str:
    if row["ndcg@10"] is None:
        return NONE
    return f"{as_score(row['ndcg@10'])} ± {row['error']:.4f}"


EXPOSURE: dict[str, dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "items": {
        "items": lambda row: as_count(row["items"]),
        "catalog": lambda row: as_percent(row["catalog"]),
        "trained": lambda row: as_percent(row["trained"]),
        "next": lambda row: as_percent(row["next"]),
        "exposure": lambda row: as_percent(row["exposure"]),
        "ratio": lambda row: _times(row["ratio"]),
        "ndcg@10 masked": _with_error,
    },
    "users": {
        "users": lambda row: as_count(row["users"]),
        "ndcg@10 masked": _with_error,
        "head in history": lambda row: as_percent(row["head_history"]),
        "next": lambda row: as_percent(row["head_next"]),
        "listed": lambda row: as_percent(row["head_exposure"]),
        "popularity bias": lambda row: formatted(row["popularity_bias"], "{:+.2f}".format),
        "coverage": lambda row: as_percent(row["coverage"]),
    },
}
"""Columns of `print_exposure`, and how a row fills them."""


def print_losses(losses: Mapping[str, Mapping[str, float]], dataset: Mapping[str, Any]) -> None:
    """Print what vectors of each precision save and lose, on standard output."""
    table = Table(title=escape(f"test users, by the precision of vectors, {named(dataset)}"))
    table.add_column("precision")
    columns = list(next(iter(losses.values())))
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for precision, values in losses.items():
        cells = [f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values.values()]
        table.add_row(precision, *cells)
    _out().print(table)


def print_plan(planned: Plan) -> None:
    """Print the cells of an experiment on standard output, in the order in which they are run."""
    out = _out()
    if not out.is_terminal:
        out.width = max(out.width, WIDE)
    table = Table(title=escape(planned.experiment.title), title_justify="left")
    for name in ("cell", "row", "state", "minutes", "estimate", "note"):
        table.add_column(name, justify="right" if name == "minutes" else "left")
    for one in planned.cells:
        minutes = "?" if one.seconds is None else f"{one.seconds / 60:.1f}"
        texts = (one.cell.key, one.cell.line, str(one.state), minutes, one.basis, one.note)
        table.add_row(*map(escape, texts))
    if planned.cells:
        out.print(table)
    out.print(planned.summary(), soft_wrap=True, markup=False)
    for left_out in planned.left_out:
        out.print(f"left out: {left_out.key}: {left_out.reason}", soft_wrap=True, markup=False)


def print_experiment(result: Mapping[str, Any]) -> None:
    """Print the result of an A/B test on standard output."""

    def percent(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.2%}"

    def probability(value: float | None) -> str:
        return "–" if value is None else f"{value:.2g}"

    def interval(reading: Mapping[str, Any] | None) -> str:
        if reading is None or reading["lift_low"] is None:
            return "–"
        return f"{percent(reading['lift_low'], '+')} .. {percent(reading['lift_high'], '+')}"

    arms, ratio = result["arms"], result["sample_ratio"]
    sizes = Table(title=escape(f"experiment {result['experiment']}"))
    for name in ("arm", *next(iter(arms.values()))):
        sizes.add_column(name, justify="left" if name == "arm" else "right")
    for name, counts in arms.items():
        sizes.add_row(name, *(f"{number:,}" for number in counts.values()))
    _out().print(sizes)
    level = f"{1 - result['alpha']:.0%} interval"
    rows, always = Table(title="if you look once"), Table(title="if you look while it runs")
    for name in ("metric", "treatment", "control", "lift", level, "p"):
        rows.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name in ("metric", "lift", f"{level} at any time", "p at any time"):
        always.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for metric, values in result["metrics"].items():
        readings = {metric: values, "  all / all": values["ratio"], "  CUPED": values["cuped"]}
        for name, reading in readings.items():
            if reading is None:
                continue
            lift = percent(reading["lift"], "+")
            means = (f"{reading[arm]:.5f}" for arm in ("treatment", "control"))
            rows.add_row(name, *means, lift, interval(reading), probability(reading["p"]))
            anytime = reading["any_time"]
            always.add_row(name, lift, interval(anytime), probability((anytime or {}).get("p")))
    _out().print(rows)
    _out().print(always)
    share = f"arms: {ratio['observed']:.2%} of users in the treatment, "
    if ratio["planned"] is None:
        share += "not checked: the log does not know what was planned (--treatment)"
    else:
        share += f"{ratio['planned']:.2%} planned, p {ratio['p']:.2g}"
    if ratio["mismatch"]:
        share += ": NOT as planned, look for what went wrong before you read on"
    _out().print(share)
    checks = Table()
    detectable = f"{result['power']:.0%} power at"
    for name in ("metric", "p (Holm)", detectable, "power at +1%", "at +5%", "at +10%"):
        checks.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for metric, values in result["metrics"].items():
        powers = (values[f"power_at_{lift}%"] for lift in (1, 5, 10))
        detected = percent(values["mde"], "+")
        checks.add_row(metric, probability(values["p_holm"]), detected, *map(percent, powers))
    _out().print(checks)
    smallest = min(counts["users"] for counts in arms.values())
    for metric, values in result["metrics"].items():
        if (needed := values["users_needed"]) is not None and needed > smallest:
            _out().print(
                f"{metric} is skewed: its p is rough until each arm has about {needed:,} users; "
                f"the smaller one has {smallest:,}"
            )
    left_out = {reason: n for reason, n in result.get("left_out", {}).items() if n}
    if left_out:
        counts = (
            f"{n:,} {'' if 'event' in reason else 'users '}{reason.replace('_', ' ')}"
            for reason, n in left_out.items()
        )
        _out().print("left out: " + ", ".join(counts))
    served = result.get("served", [])
    for one in served:
        since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one["since"]))
        line = f"{one['arm']} served by {one['run']}, version {one['version']}, since {since} UTC"
        _out().print(line, soft_wrap=True, markup=False)
    for arm in arms:
        if (versions := sum(one["arm"] == arm for one in served)) > 1:
            line = f"{arm}: {versions} versions, one after the other; what is measured is a mixture"
            _out().print(line, soft_wrap=True)
    if "over_time" in result:
        _print_over_time(result["over_time"], level)


NEWEST = 14
"""Periods of an experiment that are printed; `--json` has all."""


def _print_over_time(series: Mapping[str, Any], level: str) -> None:
    """Print the click rates of the newest periods of an A/B test, and the lift so far."""

    def rate(value: float | None) -> str:
        return "–" if value is None else f"{value:.5f}"

    periods = series["periods"]
    shown = periods[-NEWEST:]
    days = series["seconds"] % 86_400 == 0
    table = Table(title=f"clicks / exposures, the last {len(shown)} of {len(periods)} periods")
    for name in ("from (UTC)", "treatment", "control", "lift so far", f"{level} at any time"):
        table.add_column(name, justify="right", no_wrap=True)
    for period in shown:
        start = time.gmtime(period["from"])
        lift = period["so_far"]["ctr"]
        bounds = "–"
        if lift is not None:
            bounds = f"{lift['lift_low']:+.1%} .. {lift['lift_high']:+.1%}"
        table.add_row(
            time.strftime("%Y-%m-%d" if days else "%m-%d %H:%M", start),
            rate(period["treatment"]["ctr"]),
            rate(period["control"]["ctr"]),
            "–" if lift is None else f"{lift['lift']:+.1%}",
            bounds,
        )
    _out().print(table)


def print_downstream(report: Mapping[str, Any]) -> None:
    """Print both arms of the stages downstream side by side on standard output."""

    def number(value: float | None, digits: str = ".4f") -> str:
        return "–" if value is None else f"{value:{digits}}"

    def spread(arm: Mapping[str, Any]) -> str:
        sd = "" if arm["sd"] is None else f" ± {arm['sd']:.4f}"
        return number(arm["mean"]) + sd

    out = _out()
    if not out.is_terminal:
        out.width = max(out.width, WIDE)
    for name, facts in report["periods"].items():
        out.print(
            f"{name:7s} {facts['days']}  {facts['exposures']:,} exposures, "
            f"{facts['clicks']:,} clicks, {facts['replies']:,} replies of {facts['users']:,} users",
            soft_wrap=True,
        )
    level = f"{1 - report['options']['alpha']:.0%} interval"
    table = Table(title=escape(f"{report['dataset']['name']}: test, {len(report['seeds'])} seeds"))
    floors = list(report["floors"])
    for name in ("metric", *floors, "control", "treatment", "difference", level, "p", "p (Holm)"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for metric, result in report["metrics"].items():
        cells = [number(report["floors"][floor].get(metric)) for floor in floors]
        cells += [spread(result["control"]), spread(result["treatment"])]
        if result["difference"] is not None:
            low, high = number(result["low"], "+.4f"), number(result["high"], "+.4f")
            cells += [f"{result['difference']:+.4f}", f"{low} .. {high}"]
            cells += [number(result[name], ".2g") for name in ("p", "p_holm")]
        table.add_row(metric, *cells)
    out.print(table)


def print_alignment(report: Mapping[str, Any]) -> None:
    """Print how far apart two views are at every depth, and what two backbones take of one."""
    names = {
        "cka": "CKA",
        "cka_others": "of others",
        "cosine": "cosine",
        "cosine_others": "of others",
        "mmd": "MMD²",
        "rank_semantic": "rank, semantic",
        "rank_behavioral": "behavioural",
    }
    for arm in report["arms"]:
        runs = " and ".join(arm["runs"])
        table = Table(title=escape(f"{arm['kind']}: {runs}"))
        table.add_column("depth", no_wrap=True)
        for name in names.values():
            table.add_column(name, justify="right")
        for depth, found in arm["depths"].items():
            table.add_row(depth, *("–" if found[n] is None else f"{found[n]:.3f}" for n in names))
        _out().print(table)
    if (ratios := report["two_over_one"]) is not None:
        taken = ", ".join(f"{name} × {ratio:.2f}" for name, ratio in ratios.items())
        _out().print(f"two backbones over one: {taken}")


def print_doctor(report: Mapping[str, Any]) -> None:
    """Print what a training takes on standard output: by shapes for a card, then as measured."""
    out = _out()
    if not out.is_terminal:
        out.width = max(out.width, WIDE)
    card = f"{report['gpu_memory']:g} GB"
    table = Table(title=escape(f"{report['recipe']} on {report['dataset']['name']}, by shapes"))
    table.add_column("backbone", no_wrap=True)
    sizes = ("frozen", "trained_with_moments", "item_vectors", "activations", "total")
    heads = ("frozen", "trained + Adam", "item vectors", "activations", "total")
    for head in ("weights", *heads, f"fits {card}", "largest batch_tokens", "run folder"):
        table.add_column(head, justify="left" if head == "weights" else "right")
    for patient in report["backbones"]:
        shapes = patient["shapes"]
        for row in shapes["memory"]:
            cells = [_size(row.get(size)) for size in sizes]
            fits = {True: "yes", False: "no", None: "–"}[row.get("fits")]
            disk = _size(shapes["disk"]["run"])
            name = escape(patient["backbone"])
            table.add_row(name, row["weights"], *cells, fits, _batch(row), disk)
    out.print(table)
    for patient in report["backbones"]:
        for line in _about(patient):
            out.print(f"{patient['backbone']}: {line}", soft_wrap=True, markup=False)


def _batch(row: Mapping[str, Any]) -> str:
    """Say how large a batch may be."""
    if "total" not in row:
        return "–"
    if row["unlimited"]:
        return "any (batch_users ends it)"
    return "none" if row["largest_batch_tokens"] is None else f"{row['largest_batch_tokens']:,}"


def _about(patient: Mapping[str, Any]) -> list[str]:
    """Put into words what is known of one backbone."""
    shapes, measured = patient["shapes"], patient["measured"]
    parts = ", ".join(f"{name} {_count(n)}" for name, n in shapes["parts"].items() if n > 99)
    lines = [
        f"{_count(shapes['frozen_parameters'])} parameters frozen, "
        f"{_count(shapes['trained_parameters'])} trained ({parts})"
    ]
    for name, stage in shapes["stages"].items():
        if "operations" in stage:
            lines.append(
                f"{name}: {stage['steps']:,} steps and {_count(stage['tokens'])} tokens an epoch "
                f"({shapes['tokens_are']}), {stage['operations'] / 1e12:,.3g} TFLOP: "
                f"{_time(stage['seconds_on_a_card'])} at 200 TFLOP/s"
            )
    if measured is None:
        return [*lines, "nothing was measured"]
    for name, stage in measured["stages"].items():
        lines.append(
            f"{name}, measured: {stage['seconds_step']:.3g} s a step, an epoch of "
            f"{stage['steps_an_epoch']:,} steps {_time(stage['seconds_epoch'])}"
        )
    return [
        *lines,
        f"measured: a validation {_time(measured['seconds_validation'])}, peak memory "
        f"{measured['peak_memory_mb']:,.0f} MB, the whole training at most "
        f"{_time(measured['seconds_at_most'])} ({measured['hardware']})",
    ]


def _size(count: float | None) -> str:
    """Show bytes as GB, or as MB where they are few."""
    if count is None:
        return "–"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _count(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return (
                f"{number / size:.2f}{letter}" if letter == "B" else f"{number / size:.1f}{letter}"
            )
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, Mapping, Sequence)) and not value)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{k} {_shown(v)}" for k, v in value.items() if not _empty(v))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, Sequence):
        return "; ".join(_shown(v) for v in value)
    return str(value)


def print_comparison(comparison: Comparison) -> None:
    """Print tables and notes of compared runs on standard output, not wrapped in a file."""
    from l2rec.studies.tables import tables

    out = _out()
    if not out.is_terminal:
        out.width = max(out.width, WIDE)
    for plain in tables(comparison):
        table = Table(
            title=escape(plain.title),
            caption=escape(plain.caption),
            title_justify="left",
            caption_justify="left",
        )
        for number, name in enumerate(plain.header):
            table.add_column(escape(name), justify="right" if number else "left")
        for row, best in zip(plain.rows, plain.best, strict=True):
            table.add_row(*(Text(c, "bold" if b else "") for c, b in zip(row, best, strict=True)))
        out.print(table)
    for note in comparison.notes:
        _note(note)


def _note(text: str) -> None:
    """Print what to know when reading a table."""
    _out().print(f"note: {text}", soft_wrap=True, markup=False)


def print_recommendations(history: Sequence[tuple[str, str]], result: Recommendation) -> None:
    """Print a history and its ranked items, with scores and the gate, on standard output."""
    out = _out()
    earlier = len(history) - HISTORY_SHOWN
    out.print(
        "[bold]history[/bold] (oldest first"
        + (f"; {earlier:,} earlier ones are not shown)" if earlier > 0 else ")")
    )
    for item, text in history[-HISTORY_SHOWN:]:
        out.print(f"  {escape(item)}  {escape(_short(text))}", soft_wrap=True)
    gate = ""
    if result.gate is not None:
        gate = f"  (gate δ = {result.gate:.2f}: 1 is all behavioural, 0 all semantic)"
    out.print(f"[bold]recommended[/bold]{gate}")
    if not result.items:
        out.print("  nothing: what this method finds for this history is in it already")
    for rank, listed in enumerate(result.items, 1):
        text = escape(_short(listed["text"]))
        out.print(
            f"  {rank:2d}. {listed['score']:7.3f}  {escape(listed['id'])}  {text}", soft_wrap=True
        )


def print_new_items(ranking: Sequence[str], new: Sequence[str]) -> None:
    """Print where items that training never met stand in a whole ranking of ids, best first. A
    method that searches with beams ranks only what they reach.
    """
    place = {item: rank for rank, item in enumerate(ranking, 1)}
    for item in new:
        if item in place:
            where = f"is rank {place[item]:,} of {len(ranking):,}"
        else:
            where = f"is not among the {len(ranking):,} items that were found"
        _out().print(f"  {escape(item)} {where} (new: known by its text alone)", soft_wrap=True)


def _short(text: str, limit: int = 90) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
