"""What serves imports nothing that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.runs import Finished

SERVE = """
import json, sys
from pathlib import Path
from starlette.testclient import TestClient
from l2rec.service.app import create_app
from l2rec.service.events import EventLog
from l2rec.service.server import load_live
from l2rec.service.settings import Settings

folder, log = Path(sys.argv[1]), EventLog("sqlite:///" + sys.argv[2])
live, _ = load_live(folder, log, Settings(), None)
with TestClient(create_app(Settings(), live, log), base_url="http://localhost") as client:
    assert client.get("/readyz").status_code == 200
    assert client.post("/v1/recommend", json={"history": ["i1", "i2"]}).json()["items"]
    assert client.put("/v1/items", json={"items": [{"id": "n1", "text": "red lamp"}]}).is_success
    assert client.post("/v1/explain", json={"history": ["i1", "i2"]}).is_success
    assert client.get("/v1/live").is_success and client.get("/").is_success
print(json.dumps(sorted(sys.modules)))
"""
TRAINS = (
    "l2rec.runs.train",
    "l2rec.runs.loop",
    "l2rec.runs.report",
    "l2rec.runs.diagnostics",
    "l2rec.methods.floors",
    "l2rec.studies.tune",
    "l2rec.studies.compare",
    "l2rec.data.prepare",
)
SLOW = ("polars", "scipy.stats", "matplotlib", "torch.utils.tensorboard")


def test_a_server_imports_nothing_that_trains(catalog_run: Finished, tmp_path: Path) -> None:
    """Check that it loads a run and answers, without training's modules and what they need."""
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(catalog_run.run), str(tmp_path / "events.db")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "l2rec.runs.predictor" in modules
    assert sorted(modules & set(TRAINS)) == []
    assert sorted(modules & set(SLOW)) == []
