"""The load generator of benchmarks/serving.py, on a real server of a tiny run."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tests.service.test_server import serving as process
from tests.unit.conftest import Finished

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("serving", BENCHMARKS / "serving.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["serving"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_clients_count_what_they_get(load: ModuleType, table_run: Finished, tmp_path: Path) -> None:
    log = f"sqlite:///{tmp_path / 'events.db'}"
    options = ["--rate", "0", "--no-access-log", "--inflight", "4", "--log", log]
    drawn = load.Drawn([f"i{n}" for n in range(30)], seed=0)
    assert len(drawn.new()) == 10 and drawn.known() in drawn.pool
    with process(table_run.run, *options) as server:
        assert load.answers(server.port)
        few = asyncio.run(load.ask(server.port, drawn.known, 2, 0.5))
        assert set(few.statuses) == {200} and not few.broken
        assert few.statuses[200] == len(few.seconds) > 0 and few.rate > 0
        many = asyncio.run(load.ask(server.port, drawn.new, 40, 1.0))
        assert set(many.statuses) == {200, 503} and not many.broken
        assert len(many.refused) == many.statuses[503] and not many.without_retry_after
        found = load.overload(load.Server("l2rec", server.port, server.process), drawn, 0.5)
        assert found["refused"].keys() <= {"503"} and found["errors after"] >= 0
    assert not load.answers(server.port)


def test_help_teaches(load: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load.main(["--help"])
    assert stopped.value.code == 0
    assert "python benchmarks/serving.py" in capsys.readouterr().out
