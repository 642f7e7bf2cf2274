"""The page of `l2rec alignment`: outputs, layer by layer, and costs."""

from __future__ import annotations

__all__ = ["write_report"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2rec.runs.numbers import NONE, as_large, as_memory, as_score, formatted
from l2rec.studies.compare import over_seeds
from l2rec.studies.page import Cell, Group, Made, Page, Section, Table, chart_of, write

OUTPUT = "h~"
"""The depth at which views are fused: h~^v of Eq. 7."""
HEADS = {
    "cka": "CKA",
    "cka_others": "of others",
    "cosine": "cosine",
    "cosine_others": "of others",
    "mmd": "MMD²",
    "alignment": "alignment",
    "uniformity_semantic": "uniformity, semantic",
    "uniformity_behavioral": "behavioural",
    "rank_semantic": "effective rank, semantic",
    "rank_behavioral": "behavioural",
}
RANKS = ("rank_semantic", "rank_behavioral")
ABOUT = (
    "How far apart the outputs of the semantic and the behavioural view are, of the same users: in "
    "one backbone whose experts serve both views, in two backbones adapted each to one view, and "
    "before any training. The paper's premise is that sharing a backbone keeps them close."
)
NOTES = [
    "All of unit vectors. Linear CKA: 1 where one view is the other up to a rotation and a scale. "
    "Cosine: mean over users of the cosine of their two vectors. “Of others”: the same with the "
    "views of different users, which is what these are where nothing but the distributions is "
    "shared. MMD²: unbiased, RBF kernel, its scale the median distance; 0 where the distributions "
    "are one. Alignment: mean squared distance of a user's two vectors, 2 − 2 cosine. Uniformity: "
    "log mean exp(−2 d²) over pairs of users; lower is more spread. Effective rank: exp of the "
    "entropy of the singular values, centred.",
    "h~ is what Eq. 7 fuses, h what P_v reads; both are put beside item vectors in the recipe's "
    "way, and layers are read as the output is.",
]
COST_NOTE = (
    "Parameters and memory of the weights; seconds to encode 1,000 users, the least of three. Two "
    "backbones are two models, each with its own frozen weights; experts that share the frozen "
    "weights are what one backbone is."
)


def write_report(report: Mapping[str, Any], out: Path) -> None:
    """Write ``report.md`` and ``report.html`` of what `measure_alignment` found."""
    arms = _by_kind(report["arms"])
    data, backbone = report["dataset"], report["backbone"]
    facts = (
        f"{report['users']:,} test users of {data['name']}, fingerprint {data['fingerprint']}, "
        f"{report['protocol']}; backbone {backbone['name']}"
    )
    package = report["versions"]
    commit = f", commit {package['commit']}" if "commit" in package else ""
    contents = Page(
        title="How far apart two views are",
        reproduces="the premise of L2Rec (SIGIR '26)",
        about=ABOUT,
        made=f"{report['date']}, l2rec {package['l2rec']}{commit}",
        sections=[
            Section("Outputs", facts, _outputs(arms), None, NOTES),
            *(_by_layer(arms, name) for name in ("cka", "cosine", "mmd")),
            Section("Every statistic at every depth", "", _depths(arms), None, []),
            Section("Costs", report["hardware"], _costs(arms, report), None, [COST_NOTE]),
        ],
        comparisons=None,
        compared_how="",
        published=None,
        cells=[Made("all", report["command"], f"{report['hardware']}; {report['date']}")],
        unfinished=[],
        kind="alignment",
    )
    write(contents, out)


Arms = Mapping[str, Sequence[Mapping[str, Any]]]


def _by_kind(arms: Sequence[Mapping[str, Any]]) -> Arms:
    kinds = list(dict.fromkeys(arm["kind"] for arm in arms))
    return {kind: [arm for arm in arms if arm["kind"] == kind] for kind in kinds}


def _mean(arms: Sequence[Mapping[str, Any]], depth: str, name: str) -> Cell:
    """Write the mean over runs, with the deviation where there are several."""
    values = [arm["depths"].get(depth, {}).get(name) for arm in arms]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Cell(NONE)
    score, form = over_seeds(known), "{:.1f}" if name in RANKS else "{:.3f}"
    deviation = "" if score.sd is None else f" ± {form.format(score.sd)}"
    return Cell(form.format(score.mean).replace("-", "−") + deviation)


def _named(kind: str, arms: Sequence[Mapping[str, Any]]) -> str:
    return f"{kind} ({len(arms)} seeds)" if len(arms) > 1 else kind


def _outputs(arms: Arms) -> Table:
    rows = [
        (_named(kind, some), [_mean(some, OUTPUT, name) for name in HEADS])
        for kind, some in arms.items()
    ]
    return Table(["", *HEADS.values()], [Group(OUTPUT, rows)])


def _depths(arms: Arms) -> Table:
    groups = [
        Group(
            _named(kind, some),
            [(depth, [_mean(some, depth, name) for name in HEADS]) for depth in some[0]["depths"]],
        )
        for kind, some in arms.items()
    ]
    return Table(["", *HEADS.values()], groups)


def _by_layer(arms: Arms, name: str) -> Section:
    """Lay out one statistic, depths as columns, with a chart of it."""
    depths = list(dict.fromkeys(d for some in arms.values() for d in some[0]["depths"]))
    rows, series = [], {}
    for kind, some in arms.items():
        rows.append((_named(kind, some), [_mean(some, depth, name) for depth in depths]))
        means = {
            float(x): sum(values) / len(values)
            for x, depth in enumerate(depths)
            if None not in (values := [a["depths"].get(depth, {}).get(name) for a in some])
        }
        if means:
            series[kind] = means
    heading = HEADS[name]
    chart = None
    if series:
        chart = chart_of(
            series,
            title=heading,
            summary=f"{heading} by depth: {', '.join(series)}.",
            note="From the views' inputs to what is fused.",
            x_label="depth",
            names={float(x): depth.removeprefix("layer ") for x, depth in enumerate(depths)},
        )
    return Section(f"{heading} by depth", "", Table(["", *depths], [Group("", rows)]), chart, [])


def _costs(arms: Arms, report: Mapping[str, Any]) -> Table:
    """Lay out costs of arms that are trained, and what two backbones take of one."""
    header = ["", "frozen", "trained", "weights", "1,000 users", "N@10 masked"]
    rows = []
    for kind, some in arms.items():
        for arm in some:
            cost = arm["cost"]
            cells = [
                as_large(cost["frozen"]),
                as_large(cost["trained"]),
                as_memory(cost["megabytes"]),
                formatted(cost["seconds"], "{:.2f} s".format),
                ", ".join(map(as_score, arm["scores"])) or NONE,
            ]
            name = f"{kind}: {' and '.join(Path(run).name for run in arm['runs'])}"
            rows.append((name, [Cell(text) for text in cells]))
    ratios = report["two_over_one"]
    if ratios is not None:
        names = ("frozen", "trained", "megabytes", "seconds")
        factors = [Cell(formatted(ratios.get(name), "× {:.2f}".format)) for name in names]
        rows.append(("two backbones over one", [*factors, Cell(NONE)]))
    return Table(header, [Group("", rows)])
