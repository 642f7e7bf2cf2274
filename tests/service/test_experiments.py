"""Experiments from end to end: what is served, what the log knows, what abtest makes of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.support.runs import Finished
from tests.support.service import error
from typer.testing import CliRunner

from l2rec.cli import app
from l2rec.data.dataset import Dataset
from l2rec.errors import CheckpointError, ConfigError, L2RecError
from l2rec.runs.folder import load_run_config, training_split, user_history
from l2rec.service.app import create_app
from l2rec.service.events import Event, EventLog
from l2rec.service.experiments import popular, record_arms, record_plan
from l2rec.service.live import Live, deploy
from l2rec.service.loading import load_version
from l2rec.service.server import load_live
from l2rec.service.settings import Experiment, Settings
from l2rec.studies.arms import arm

NOTHING: Any = ({}, frozenset())


def events_of(users: int, share: float, salt: str = "", name: str = "plus") -> list[Event]:
    events = []
    for n in range(users):
        of = {"experiment": name, "arm": arm(f"u{n}", name, salt=salt, treatment=share)}
        events.append(Event(f"x{n}", f"u{n}", "i1", "exposure", 1e9 + n, **of))
        if n % 3 == 0:
            events.append(Event(f"c{n}", f"u{n}", "i1", "click", 1e9 + n, **of))
    return events


def abtest(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["abtest", *arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_a_share_that_the_log_knows_is_checked_and_another_is_not(
    catalog_run: Finished, tmp_path: Path
) -> None:
    """As defect 4 of the service: 30% were served, and 6% is only a default."""
    path = tmp_path / "events.db"
    log = EventLog(f"sqlite:///{path}")
    log.append(events_of(600, 0.3, "2026"))
    unknown = abtest(str(path))
    assert unknown["sample_ratio"]["observed"] == pytest.approx(0.3, abs=0.05)
    assert unknown["sample_ratio"]["p"] is unknown["sample_ratio"]["mismatch"] is None
    shown = CliRunner().invoke(app, ["abtest", str(path)], catch_exceptions=False).stdout
    assert "not checked" in shown and "NOT as planned" not in shown and "p 0" not in shown
    assert abtest(str(path), "--treatment", "0.06")["sample_ratio"]["mismatch"]
    running = Experiment(name="plus", treatment=0.3, salt="2026")
    settings = Settings(experiment=running)
    live, _ = load_live(catalog_run.run, log, settings, None)
    record_plan(log, running)
    record_arms(log, running, live.all())
    known = abtest(str(path))
    assert known["sample_ratio"]["planned"] == 0.3 and not known["sample_ratio"]["mismatch"]
    served = [(one["arm"], one["run"], one["version"]) for one in known["served"]]
    version = live.version.version
    assert served == [("control", "catalog", version), ("treatment", "catalog", version)]
    shown = CliRunner().invoke(app, ["abtest", str(path)], catch_exceptions=False).stdout
    assert "30.00% planned" in shown and "treatment served by catalog" in shown
    assert "if you look while it runs" in shown and "lift so far" in shown
    assert "mixture" not in shown
    record_arms(log, running, {"live": replace(live.version, name="newer")})
    shown = CliRunner().invoke(app, ["abtest", str(path)], catch_exceptions=False).stdout
    assert "treatment: 2 versions, one after the other; what is measured is a mixture" in shown
    with pytest.raises(ConfigError, match=r"was served with 0\.3; leave the option out"):
        abtest(str(path), "--treatment", "0.5")
    with pytest.raises(ConfigError, match="move users between its arms"):
        record_plan(log, Experiment(name="plus", treatment=0.4, salt="2026"))
    log.close()


def test_the_log_names_what_was_deployed_during_an_experiment(
    catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    deploy(catalog_run.run, tmp_path)
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    running = Experiment(name="plus", treatment=0.5)
    settings = Settings(experiment=running, poll=0.05)
    live, follow = load_live(tmp_path, log, settings, other_run.run)
    record_plan(log, running)
    record_arms(log, running, live.all())
    before = {(one.arm, one.run) for one in log.plans()["plus"].served}
    assert before == {("treatment", "catalog"), ("control", "other")}
    web = create_app(settings, live, log, follow=follow)
    with TestClient(web, base_url="http://localhost") as client:
        deploy(other_run.run, tmp_path)
        for _ in range(400):
            if client.get("/v1/live").json()["name"] == "other":
                break
        assert client.get("/v1/live").json()["name"] == "other"
        served = log.plans()["plus"].served
        assert [one.run for one in served if one.arm == "treatment"] == ["catalog", "other"]
        assert len(served) == 3


def test_popularity_as_the_control_arm(
    catalog_run: Finished, chains: Dataset, tmp_path: Path
) -> None:
    log = EventLog(f"sqlite:///{tmp_path / 'events.db'}")
    settings = Settings(rate=0, experiment=Experiment(name="plus", treatment=0.5))
    live, _ = load_live(catalog_run.run, log, settings, "popularity")
    assert live.control is not None and live.control.name == "popularity"
    config, _ = load_run_config(catalog_run.run)
    taken = Counter(training_split(config, chains).train.values.tolist())
    ids = chains.item_ids.to_pylist()
    expected = sorted(range(len(ids)), key=lambda item: (-taken[item], item))
    best = [ids[item] for item in expected]
    record_plan(log, Experiment(name="plus", treatment=0.5))
    record_arms(log, Experiment(name="plus", treatment=0.5), live.all())
    served = {one.arm: one.run for one in log.plans()["plus"].served}
    assert served == {"treatment": "catalog", "control": "popularity"}
    web = create_app(settings, live, log)
    with TestClient(web, base_url="http://localhost") as client:

        def listed(user: str, history: list[str], **more: Any) -> list[str]:
            body = {"user": user, "history": history, "k": 40, **more}
            answer = client.post("/v1/recommend", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["experiment"]["arm"] == "control"
            return [item["id"] for item in answer.json()["items"]]

        def of_control(prefix: str) -> str:
            names = (f"{prefix}{n}" for n in range(40))
            return next(name for name in names if arm(name, "plus", treatment=0.5) == "control")

        user = of_control("u")
        seen = user_history(catalog_run.run, user)
        answer = client.post("/v1/recommend", json={"user": user, "k": 40}).json()
        assert [item["id"] for item in answer["items"]] == [i for i in best if i not in seen]
        assert not answer["fallback"]
        # Who is unknown gets the same, not what is popular in the log and in what is tested.
        answer = client.post("/v1/recommend", json={"user": of_control("new"), "k": 40}).json()
        counts = [taken[item] for item in expected]
        assert [(one["id"], one["score"]) for one in answer["items"]] == [
            *zip(best, counts, strict=True)
        ]
        many = {"requests": [{"user": of_control("new"), "k": 3}]}
        (one,) = client.post("/v1/recommend/batch", json=many).json()["answers"]
        assert [item["id"] for item in one["items"]] == best[:3] and not one["fallback"]
        assert listed(user, ["i1", "i2"], exclude_seen=False) == best
        assert listed(user, [best[0]]) == best[1:]
        # Items that came later are the least popular; a new text does not make one unpopular.
        items = [{"id": "n1", "text": "heavy red hat"}, {"id": best[0], "text": "another text"}]
        assert client.put("/v1/items", json={"items": items}).status_code == 200
        assert listed(user, ["n1"], exclude_seen=False) == [*best, "n1"]
        assert listed(user, ["i1", "i2"], exclude_seen=False) == [*best, "n1"]  # asked before
        client.request("DELETE", "/v1/items", params={"id": best[1]})
        assert best[1] not in listed(user, ["n1"])


def test_what_only_the_live_version_knows_is_no_mistake_in_the_control_arm(
    catalog_run: Finished, other_run: Finished, tmp_path: Path
) -> None:
    newer = {"n1": ("heavy red hat", {"color": "red"}), "i2": ("cold door", {"color": "blue"})}
    version = load_version(catalog_run.run)
    live = Live(version.with_items(newer), control=load_version(other_run.run))
    settings = Settings(rate=0, experiment=Experiment(name="plus", treatment=0.5))
    web = create_app(settings, live, EventLog(f"sqlite:///{tmp_path / 'events.db'}"))
    with TestClient(web, base_url="http://localhost") as client:

        def asked(history: list[str], **more: Any) -> Any:
            for user in map(str, range(40)):
                if arm(user, "plus", treatment=0.5) == "control":
                    body = {"user": user, "history": history, **more}
                    return client.post("/v1/recommend", json=body)

        alone = asked(["i1"]).json()
        answer = asked(["i1", "n1"]).json()
        assert answer["unknown"] == ["n1"] and answer["items"] == alone["items"]
        refused = asked(["i1", "n1", "zz"])
        assert error(refused, 422).startswith("unknown item ids: 'zz'")
        assert asked(["n1"]).json()["fallback"]
        answer = asked(["i1"], filters={"color": ["red", "blue"]}).json()
        assert [item["id"] for item in answer["items"]] == ["i2"]
        refused = asked(["i1"], filters={"colour": ["red"]})
        assert refused.status_code == 422 and "did you mean 'color'" in refused.json()["detail"]


def test_popularity_needs_the_data_of_the_run(
    catalog_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(popular(catalog_run.run, NOTHING)) == 30

    def gone(*_: Any) -> Any:
        raise CheckpointError("the data set of RUN is no longer at PATH")

    monkeypatch.setattr("l2rec.service.experiments.open_run_dataset", gone)
    with pytest.raises(L2RecError, match="no longer at PATH"):
        popular(catalog_run.run, NOTHING)
