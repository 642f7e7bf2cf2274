"""Measure everything, and write docs/performance.md from the measurements.

    python benchmarks/performance.py --data DIR [DIR ...]     all parts, one after the other
    python benchmarks/performance.py --only step,growth       these anew, the page from all
    python benchmarks/performance.py --only none              the page alone

A part is a script beside this one; its measurements are stored in results/performance/<part>.json,
and every figure of the page comes from there. DIR are data sets written by `l2rec prepare`, RUN
finished runs; without them the parts that need them are left out. All parts use one thread unless
--threads says otherwise: ratios of a step are steadier, and other processes disturb them less.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from measure import shown

from l2rec.config import recipe_names

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
RESULTS = ROOT / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A script to run.

    ``needs``: nothing, the prepared data sets, the first of them, a finished run, or several.
    ``gpu``: left out where there is no GPU.
    """

    name: str
    needs: Literal["nothing", "data", "first", "run", "runs"] = "nothing"
    gpu: bool = False

    def command(
        self, options: Sequence[str], data: Sequence[str], runs: Sequence[str]
    ) -> list[str]:
        """Build the command line that runs it, after ``python``."""
        script, _, device = self.name.partition("-")
        given = {
            "nothing": [],
            "data": ["--data", *(data or ["DIR"])],
            "first": ["--data", *(data[:1] or ["DIR"])],
            "run": ["--run", *(runs[:1] or ["RUN"])],
            "runs": [
                "--run",
                *(runs[:1] or ["RUN"]),
                *(["--runs", *runs[1:3]] if runs[1:] else []),
            ],
        }[self.needs]
        return [
            f"benchmarks/{script}.py",
            *(["--device", device] if device else []),
            *options,
            *given,
        ]


PARTS = (
    Part("step"),
    Part("step-cuda", gpu=True),
    Part("loss"),
    Part("breakdown", "first"),
    Part("systems", "first"),
    Part("growth"),
    Part("growth-cuda", gpu=True),
    Part("memory", "first"),
    Part("padding", "data"),
    Part("encoding", "data"),
    Part("ranking", "data"),
    Part("decoding"),
    Part("preparation"),
    Part("startup"),
    Part("precision", "runs"),
    Part("serving", "run"),
    Part("limits", "run"),
)
NAMED = {
    "earlier": ("work", "WORK"),
    "loss": ("contender", "CONTENDERS"),
    "memory": ("work", "WORK"),
    "padding": ("recipe", "RECIPES"),
    "systems": ("system", "SYSTEMS"),
}
"""By script: the column that says what a row measures, and the script's table of what there is."""


# -- measuring -----------------------------------------------------------------------------------


def run(part: Part, options: Sequence[str], data: Sequence[str], runs: Sequence[str]) -> bool:
    """Measure one part; its script prints the result. Return False if it fails."""
    script, *rest = part.command(options, data, runs)
    file = RESULTS / f"{part.name}.json"
    print(f"\n== {part.name}: python {script} {' '.join(rest)}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / script, *rest, "--json", file])
    print(f"== {part.name}: {time.monotonic() - started:.0f} s", flush=True)
    return done.returncode == 0


def documents() -> dict[str, Document]:
    """Read the measurements of all parts."""
    files = sorted(RESULTS.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


# -- the page ------------------------------------------------------------------------------------


def page(found: Mapping[str, Document], plots: Mapping[str, str]) -> str:
    """Write the text of docs/performance.md. ``plots``: picture of each part with curves."""
    order = [part.name for part in PARTS]
    names = sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))
    missing = [part for part in PARTS if part.name not in found and not part.gpu]
    blocks = [
        "# Performance",
        "Written by `python benchmarks/performance.py`: every figure comes from the command under "
        "its table, run on the machine and day that are named there; where today's command gives "
        "other rows, a line says so. Compare ratios and slopes; seconds depend on the machine. A "
        "MB is 2^20 bytes. A goal that was not reached stays in the table.",
        "Data sets that a command names were made by `l2rec prepare`; `runs/demo` and "
        "`runs/demo-blended` are what `make demo` leaves, and `../earlier` a checkout of an "
        "earlier build, as the head of `benchmarks/earlier.py` makes it. How the other runs were "
        "trained is not recorded: any finished run can take their place, and gives other figures.",
        "## Goals",
        table(
            [("path", "path"), ("goal", "goal"), ("measured", "measured"), ("reached", "reached")],
            [line for name in names for line in goals(found[name])],
        ),
    ]
    if missing:
        listed = [
            f"- {part.name}: `python {' '.join(part.command([], [], []))}`" for part in missing
        ]
        blocks.append("Not measured:\n\n" + "\n".join(listed))
    for name in names:
        blocks += section(name, found[name], plots.get(name))
    return "\n\n".join(blocks) + "\n"


def section(name: str, document: Document, plot: str | None) -> list[str]:
    blocks = [f"## {name.capitalize()}", f"Goal: {document['goal'].rstrip('.')}."]
    blocks.append(table([tuple(column) for column in document["columns"]], document["rows"]))
    if plot:
        blocks.append(f"![Curves of the part {name}, with their slopes]({plot})")
    blocks += [*document["notes"], *remarks(document)]
    where = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    return [*blocks, f"`{document['command']}`: {where}."]


def remarks(document: Document) -> list[str]:
    """Say how what was measured differs from what the same command measures today."""
    said = []
    if names := gone(document):
        listed = ", ".join(f"`{name}`" for name in names)
        said = [f"Of an earlier version, which had {listed}: today's command gives other rows."]
    if unequal(document):
        said.append(
            "Of an earlier version, whose peer encoded in float32 whatever l2rec encoded in; today "
            "both have one precision. Where a processor multiplies bfloat16 faster, the ratios are "
            "too good: they reach no goal."
        )
    return said


def unequal(document: Document) -> bool:
    """Say whether a part compares servers whose precisions may not have been the same."""
    return document["part"] == "serving" and "dtype" not in document


def goals(document: Document) -> list[dict[str, object]]:
    """Return the goals of a part; what was not compared fairly has reached none."""
    lines = [dict(line) for line in document.get("summary", ())]
    for line in lines:
        if unequal(document) and "of the peer" in str(line["goal"]):
            line["reached"] = None
    return lines


def gone(document: Document) -> list[str]:
    """Name what a part has measured that its script, or the package, no longer has."""
    _, path, *options = shlex.split(document["command"])
    column, known = NAMED.get(Path(path).stem, ("", ""))
    rows = [row[column] for row in document["rows"] if column in row]
    there = vars(importlib.import_module(Path(path).stem))[known] if rows else ()
    said = re.findall(r"\brecipe ([\w/-]+)", "\n".join(document["notes"]))
    said += [row["recipe"] for row in document["rows"] if "recipe" in row]
    for word, value in itertools.pairwise(options):
        said += [value] if word == "--recipe" else []
    recipes = recipe_names()
    return sorted(
        {name for name in rows if name not in there} | {r for r in said if r not in recipes}
    )


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table in Markdown; columns of numbers are aligned to the right."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    def number(key: str) -> bool:
        return any(type(row.get(key)) in (int, float) for row in rows)

    head = [line([header for _, header in columns])]
    head.append("|" + "|".join("---:" if number(key) else "---" for key, _ in columns) + "|")
    return "\n".join(head + [line([shown(row.get(key)) for key, _ in columns]) for row in rows])


INK, LINE = "#808890", "#3b82c4"  # both can be read on white and on black


def plot(curves: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw every curve in a field of its own, both axes logarithmic, beside a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, ScalarFormatter

    style = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    # Without the salt and the date, the same figures would give another file each time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "l2rec", "font.size": 9}
    with plt.rc_context({**style, **settings}):
        columns = min(3, len(curves))
        lines = -(-len(curves) // columns)
        figure, fields = plt.subplots(
            lines, columns, figsize=(3.4 * columns, 2.7 * lines), squeeze=False
        )
        for field in fields.flat[len(curves) :]:
            field.remove()
        for field, curve in zip(fields.flat, curves, strict=False):
            x, y, fitted = curve["x"], curve["y"], curve["fitted"]
            field.loglog(x, y, "o-", color=LINE, markersize=4)
            linear = [y[-fitted] * value / x[-fitted] for value in x[-fitted:]]
            field.loglog(x[-fitted:], linear, "--", color=INK, linewidth=1)
            field.set_title(f"{curve['name']}: slope {curve['slope']:.2f}", fontsize=9)
            field.set_xlabel(curve["x_label"])
            field.set_ylabel(curve["y_label"])
            field.set_xticks(x)
            field.xaxis.set_major_formatter(ScalarFormatter())
            field.set_yticks([min(y), max(y)], [shown(min(y)), shown(max(y))])
            for axis in (field.xaxis, field.yaxis):
                axis.set_minor_locator(NullLocator())
            field.tick_params(axis="x", labelrotation=45)
            field.patch.set_alpha(0)
            field.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)


def write_page(found: Mapping[str, Document], target: Path) -> None:
    plots = {}
    for name, document in found.items():
        if document.get("curves"):
            plots[name] = f"{target.stem}/{name}.svg"
            plot(document["curves"], target.parent / plots[name])
    target.write_text(page(found, plots), encoding="utf-8")


# -- the command ---------------------------------------------------------------------------------


def chosen_parts(only: str, given: set[str], gpu: bool) -> list[Part]:
    """Choose the parts to measure: those named, or all whose needs are met.

    Raises:
        ValueError: ``only`` names a part that does not exist.
    """
    if not only:
        return [part for part in PARTS if gpu >= part.gpu and part.needs in given]
    known = {part.name: part for part in PARTS}
    names = [] if only == "none" else only.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name!r}: choose from {', '.join(known)}, or none")
    return [known[name] for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="benchmarks/performance.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--only", default="", metavar="PART,...", help="these parts alone, or none")
    p.add_argument("--quick", action="store_true", help="a first impression of every part")
    p.add_argument("--threads", type=int, default=1, help="of every part (default %(default)s)")
    p.add_argument("--data", nargs="+", default=[], metavar="DIR", help="prepared data sets")
    p.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="a finished run to score in both precisions and to serve, and two trained in each",
    )
    args = p.parse_args(argv)
    given = {"nothing"} | ({"data", "first"} if args.data else set())
    given |= {"run", "runs"} if args.runs else set()
    try:
        parts = chosen_parts(args.only, given, torch.cuda.is_available())
    except ValueError as error:
        p.error(str(error))
    for part in parts:
        if part.needs not in given:
            option = "--runs RUN" if part.needs in ("run", "runs") else "--data DIR"
            p.error(f"{part.name} needs {option}")
    options = [*(["--quick"] if args.quick else []), "--threads", str(args.threads)]
    failed = [part.name for part in parts if not run(part, options, args.data, args.runs)]
    write_page(documents(), PAGE)
    print(f"\n{PAGE.relative_to(ROOT)} is written")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what they measured before is still on the page")


if __name__ == "__main__":
    main()
