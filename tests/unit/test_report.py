"""The HTML report: complete, self-contained, escaped, and robust to missing parts."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from l2rec.errors import CheckpointError
from l2rec.runs.chart import scaled, ticks
from l2rec.runs.report import _short_names, write_report

VOID = {"meta", "link", "br", "img", "input", "hr"}
SVG_SHAPES = {"line", "path", "rect", "circle"}
EVIL = "<script>alert('x')</script> & \"co\""


class Outline(HTMLParser):
    """A parser that checks that tags nest, and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_SHAPES
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def scores(recall: float, ndcg: float) -> dict[str, float]:
    plain = {f"recall@{k}": recall * k / 10 for k in (5, 10, 20)}
    plain |= {f"ndcg@{k}": ndcg * k / 10 for k in (5, 10, 20)} | {"mrr": ndcg * 0.9}
    return plain | {f"{name}_masked": value * 1.5 for name, value in plain.items()}


def report() -> dict[str, Any]:
    return {
        "method": "l2rec",
        "recipe": "synthetic/l2rec",
        "command": "l2rec train synthetic/l2rec --out runs/a",
        "seed": 7,
        "dataset": {
            "name": "chains",
            "fingerprint": "f1n9",
            "users": 900,
            "items": 60,
            "events": 7,
        },
        "backbone": {"name": "tiny", "parameters": 22_700_000, "trained_parameters": 1_240_000},
        "hardware": "2 cores",
        "versions": {"torch": "2.13.0"},
        "date": "2026-11-22",
        "wall_seconds": 3725.0,
        "tokens_seen": 18_432_000,
        "peak_memory_mb": 1712.0,
        "steps": 30,
        "best_step": 20,
        "scores": {
            "l2rec": scores(0.12, 0.0600) | {"coverage@10": 0.8102},
            "popularity": scores(0.08, 0.0400),
        },
        "significance": {"popularity": {"difference": 0.02, "p": 0.0004}},
        "split": "test",
    }


def events() -> list[dict[str, Any]]:
    train = [
        {"event": "train", "step": s, "loss": 5 - s / 10, "parts": {"fused": 4.0}}
        for s in range(1, 31)
    ]
    valid = [
        {"event": "valid", "step": s, "ndcg@10": v, "ndcg@10_masked": v * 1.5}
        for s, v in [(0, 0.03), (10, 0.05), (20, 0.062), (30, 0.061)]
    ]
    return train + valid


def diagnostics() -> dict[str, Any]:
    rows = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]
    item = {"id": "i1", "text": EVIL, "score": 0.9}
    return {
        "experts": {"semantic": rows, "behavioral": rows},
        "matrices": ["layer.0.attention.query", "layer.1.attention.query"],
        "gate": {"bin_edges": [0, 0.5, 1], "counts": [3, 1], "mean": 0.31},
        "examples": [
            {
                "user": EVIL,
                "earlier": 2,
                "history": [{"id": f"h{n}", "text": f"past {n}"} for n in range(2, 12)],
                "items": [item, {"id": "i2", "text": "second", "score": 0.5}],
                "held_out": {"id": "i2", "text": "second"},
                "gate": 0.4,
            },
            {"user": "u2", "history": [], "items": [item], "held_out": {"id": "z", "text": "zed"}},
        ],
    }


def fill(run: Path, **parts: Any) -> None:
    if "events" in parts:
        lines = "\n".join(json.dumps(event) for event in parts["events"])
        (run / "metrics.jsonl").write_text(lines)
    for name in ("report", "diagnostics"):
        if name in parts:
            (run / f"{name}.json").write_text(json.dumps(parts[name]))


def outline(run: Path) -> Outline:
    parsed = Outline()
    parsed.feed(write_report(run).read_text(encoding="utf-8"))
    parsed.close()
    assert parsed.open == []
    return parsed


@pytest.fixture
def full(tmp_run: Path) -> Path:
    fill(tmp_run, report=report(), events=events(), diagnostics=diagnostics())
    return tmp_run


def test_headline_compares_in_the_convention_that_suits_the_floors_best(tmp_run: Path) -> None:
    content = report()
    content["scores"]["popularity"] |= {"ndcg@10": 0.1}  # above its masked score
    fill(tmp_run, report=content, events=events(), diagnostics=diagnostics())
    text = " ".join(outline(tmp_run).text.split())
    assert "40.0% below popularity, the best floor (0.1000)" in text
    assert "significant over users, p < 0.001" in text


def test_the_run_that_a_blend_is_made_of_is_no_floor(tmp_run: Path) -> None:
    content = report() | {"blend": {"near": 0.1}}
    own, *floors = content["scores"].items()
    plain = {name: 0.99 for name in own[1]}
    content["scores"] = dict([("blended", own[1]), (own[0], plain), *floors])
    fill(tmp_run, report=content, events=events(), diagnostics=diagnostics())
    text = " ".join(outline(tmp_run).text.split())
    assert "50.0% above popularity, the best floor (0.0600, history masked)" in text


def test_the_best_step_is_marked_on_the_score_that_chose_it(tmp_run: Path) -> None:
    content = report() | {"selected_by": "ndcg@10_masked"}
    fill(tmp_run, report=content, events=events(), diagnostics=diagnostics())
    text = " ".join(outline(tmp_run).text.split())
    assert "best 0.0930" in text and "untrained 0.0450" in text
    assert "The best step is chosen by the score with the history masked." in text


def test_page_has_every_section(full: Path) -> None:
    page = outline(full)
    text = " ".join(page.text.split())
    assert "l2rec on chains" in text
    assert "50.0% above popularity, the best floor (0.0600, history masked)" in text
    assert "best 0.0620" in text and "untrained 0.0300" in text  # an earlier version's choice
    assert "The best step is chosen by the score with the history not masked." in text
    assert "mean 0.31" in text and "uniform 25%" in text
    assert "Held out, and not in this list: zed" in text
    assert "2 earlier events not shown" in text
    assert "22.7 M parameters, 1.24 M trained" in text
    assert "catalog coverage@10" in text and "81%" in text
    assert "1 h 2 min" in text and "18,432,000" in text and "f1n9" in text
    assert "missing" not in dict(page.attributes).values()
    assert page.tags.count("svg") == 5


def test_page_makes_no_request(full: Path) -> None:
    page = outline(full)
    html = (full / "report.html").read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html and "url(" not in html
    assert "@import" not in html
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload"} & {name for name, _ in page.attributes}


def test_texts_are_escaped(full: Path) -> None:
    page = outline(full)
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 3


def test_every_chart_is_described(full: Path) -> None:
    html = write_report(full).read_text(encoding="utf-8")
    charts = re.findall(r"<svg [^>]*>", html)
    assert charts and all('role="img" aria-label="' in chart for chart in charts)


def test_best_of_each_column_is_bold_and_ties_share_it(tmp_run: Path) -> None:
    data = report() | {"scores": {"a": {"mrr": 0.25, "ndcg@10": 0.1}, "b": {"mrr": 0.25}}}
    fill(tmp_run, report=data)
    html = write_report(tmp_run).read_text(encoding="utf-8")
    assert html.count("<b>0.2500</b>") == 2
    assert "<b>–</b>" not in html


def test_a_score_below_the_best_floor_is_reported_as_below(tmp_run: Path) -> None:
    data = report()
    unmasked = {"l2rec": scores(0.1, 0.03), "popularity": scores(0.1, 0.04)}
    data["scores"] = {
        name: {key: value for key, value in row.items() if not key.endswith("_masked")}
        for name, row in unmasked.items()
    }
    data["significance"] = {"popularity": {"difference": -0.01, "p": 0.2}}
    fill(tmp_run, report=data)
    text = " ".join(outline(tmp_run).text.split())
    assert "25.0% below popularity" in text
    assert "not significant over users, p = 0.200" in text
    assert "−0.0100" in text


@pytest.mark.parametrize("present", ["report", "events", "diagnostics", None])
def test_missing_parts_are_noted(tmp_run: Path, present: str | None) -> None:
    parts = {"report": report(), "events": events(), "diagnostics": diagnostics()}
    fill(tmp_run, **({present: parts[present]} if present else {}))
    text = outline(tmp_run).text
    assert ("No score table" in text) == (present != "report")
    assert ("No loss curve" in text) == (present != "events")
    assert ("No expert load" in text) == (present != "diagnostics")
    assert ("No gate histogram" in text) == (present != "diagnostics")


def test_remarks_stand_beside_the_scores(tmp_run: Path) -> None:
    fill(tmp_run, report=report() | {"remarks": ["ranks what <it> reaches"]})
    assert "l2rec: ranks what <it> reaches." in outline(tmp_run).text
    fill(tmp_run, report=report() | {"leaky": True})
    assert "l2rec (leaky) on chains" in outline(tmp_run).text
    fill(tmp_run, report=report() | {"remarks": []})
    assert not any(word in outline(tmp_run).text for word in ("reaches", "leaky"))


@pytest.mark.parametrize(
    ("collisions", "first"), [([0.95, 0.133], "95.0%"), (0.133, "–")], ids=["by level", "of all"]
)
def test_codes_are_shown_where_items_have_some(tmp_run: Path, collisions: Any, first: str) -> None:
    """Earlier versions wrote one number, of all levels together."""
    codes = {"used": [1.0, 0.984], "perplexity": [240.26, 177.0], "collisions": collisions}
    fill(tmp_run, report=report(), diagnostics=diagnostics() | {"codes": codes})
    text = "".join(outline(tmp_run).text.split())
    assert f"itemsthatcollide1100.0%240.3{first}298.4%177.013.3%" in text
    fill(tmp_run, diagnostics=diagnostics())
    assert "Codes" not in outline(tmp_run).text


def test_torn_lines_and_nan_do_no_harm(tmp_run: Path) -> None:
    fill(tmp_run, events=[*events(), {"event": "train", "step": 31, "loss": math.nan}])
    with (tmp_run / "metrics.jsonl").open("a") as file:
        file.write('\n[1]\n{"event": "train", "st')
    outline(tmp_run)
    assert "nan" not in (tmp_run / "report.html").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("loss", [0.0, 3.0])
def test_one_point_makes_a_chart(tmp_run: Path, loss: float) -> None:
    lonely = [
        {"event": "train", "step": 1, "loss": loss},
        {"event": "valid", "step": 0, "ndcg@10": 0},
    ]
    fill(tmp_run, events=lonely)
    assert outline(tmp_run).tags.count("svg") == 2


def test_long_training_stays_small(tmp_run: Path) -> None:
    fill(tmp_run, events=[{"event": "train", "step": s, "loss": 1 / s} for s in range(1, 50_000)])
    assert write_report(tmp_run).stat().st_size < 60_000


def test_report_replaces_itself_and_leaves_nothing_behind(full: Path) -> None:
    before = {path.name for path in full.iterdir()}
    assert write_report(full) == write_report(full) == full / "report.html"
    assert {path.name for path in full.iterdir()} == before | {"report.html"}


def test_errors_say_what_to_do(tmp_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run folder; give the --out"):
        write_report(tmp_run / "nowhere")
    (tmp_run / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"report.json is not JSON .* evaluate the run again"):
        write_report(tmp_run)
    (tmp_run / "report.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds no JSON object"):
        write_report(tmp_run)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0484, 0.0907), (-3, 1200), (0, 1e-6), (5, 5)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)


def test_small_helpers() -> None:
    assert scaled(5, (0, 10), (100, 200)) == 150
    assert scaled(5, (5, 5), (100, 200)) == 150
    assert _short_names(["a.0.q", "a.1.q"]) == ["0", "1"]
    assert _short_names(["a.0.q"]) == ["a.0.q"]
    assert _short_names(["a.b", "c"]) == ["a.b", "c"]
