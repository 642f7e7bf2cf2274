"""The dashboard for Grafana asks for metrics that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tests.support.service import Serve

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"


def test_every_series_of_the_dashboard_is_one_of_the_server_s(serve: Serve) -> None:
    told = serve().get("/metrics").text
    names: set[str] = set()
    for family in text_string_to_metric_families(told):
        names |= {f"{family.name}{end}" for end in ENDS[family.type]}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 10
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    for expression in asked:
        series = re.findall(r"l2rec_\w+", expression)
        assert series and set(series) <= names, expression


ENDS = {
    "counter": ["_total"],
    "histogram": ["_bucket", "_sum", "_count"],
    "summary": ["_sum", "_count"],
    "gauge": [""],
}
"""Ends of the names of a family's series."""
